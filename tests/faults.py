"""Errors injected around each write to the journal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatterbox_turbo.passes import ALL_PASSES
from chatterbox_turbo.patching import Journal


class Injected(Exception):
    """Raised on purpose by a test."""


@dataclass
class Faults:
    """Places at which an error can be injected while a model is optimized; see ``faults_around``."""

    target: int = 0
    passed: int = 0

    def arm(self, target: int) -> None:
        """Raise at the place of this number, counted from 1; 0 counts only."""
        self.target, self.passed = target, 0

    def reach(self) -> None:
        self.passed += 1
        if self.passed == self.target:
            raise Injected


def faults_around(monkeypatch: Any, name: str = "") -> Faults:
    """A place before and one after each write to the journal.

    With the ``name`` of a pass only the writes of its own ``apply`` count, and one place more follows it.
    """
    faults, inside = Faults(), not name

    def failing(verb):
        def write(self, *args, **options):
            if inside:
                faults.reach()
            verb(self, *args, **options)
            if inside:
                faults.reach()

        return write

    for verb in ("set", "record"):  # wrap calls set
        monkeypatch.setattr(Journal, verb, failing(getattr(Journal, verb)))
    for p in ALL_PASSES:
        if p.name == name:

            def apply(context, apply=p.apply):
                nonlocal inside
                inside = True
                try:
                    remark = apply(context)
                    faults.reach()
                finally:
                    inside = False
                return remark

            monkeypatch.setattr(p, "apply", apply)
    return faults
