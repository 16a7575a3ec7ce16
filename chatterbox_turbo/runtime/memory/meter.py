"""How much memory each phase of a request needed, and a history of requests."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .. import forks
from . import readings

REQUESTS = 128  # that the history keeps


class Meter:
    """Peaks by phase, and what the last requests needed.

    A phase's peak is what was in use at its beginning or end, or, where the process has never needed more, the new
    highest: two readings a phase, of some microseconds, that disturb nothing. That can miss what a phase took and gave
    back below the highest so far.

    Args:
        device: where the model is.
        exact: let the counter of the highest begin anew for each phase, so that nothing is missed. The counter is the
            process's: whoever else reads it (``torch.cuda.max_memory_allocated``, VmHWM) sees the phase's, and phases
            of two models at the same time see each other's.
        limit: requests that are kept.
    """

    def __init__(self, device: torch.device, exact: bool = False, limit: int = REQUESTS):
        self._device, self._exact = device, exact
        self.peaks: dict[str, int] = {}
        self.missed = not exact  # whether a peak may have been higher than what is known of it
        self._requests: deque[dict[str, Any]] = deque(maxlen=limit)
        self._phases: list[dict[str, Any]] | None = None
        self._began, self._inside = 0.0, False

    @contextmanager
    def request(self, kind: str) -> Iterator[None]:
        """A request in the body, with the phases in it; one within another belongs to that one."""
        if self._phases is not None:
            yield
            return
        phases: list[dict[str, Any]] = []
        before, at, self._began = readings.level(self._device), time.time(), time.perf_counter()
        try:
            with forks.undoing(partial(setattr, self, "_phases", None)):
                self._phases = phases
                yield
        finally:
            after = readings.level(self._device)
            self._requests.append(
                {
                    "kind": kind,
                    "at": at,
                    "seconds": time.perf_counter() - self._began,
                    "before": before,
                    "after": after,
                    "peak": max(before, after, *(phase["peak"] for phase in phases)),
                    "phases": phases,
                }
            )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase in the body, also one that fails; one within another belongs to that one, as a batch's do."""
        if self._inside:
            yield
            return
        if self._exact and not readings.reset_peak(self._device):
            self.missed = True
        start = time.perf_counter()
        before, ceiling = readings.reading(self._device)
        try:
            with forks.undoing(partial(setattr, self, "_inside", False)):
                self._inside = True
                yield
        finally:
            after, now = readings.reading(self._device)
            counts = now is not None and (now > (ceiling or 0) or not self.missed)
            peak = max(before, after, now if counts else 0)
            self.peaks[name] = max(peak, self.peaks.get(name, 0))
            if self._phases is not None:
                spans = {"start": start - self._began, "seconds": time.perf_counter() - start}
                self._phases.append({"name": name, **spans, "before": before, "after": after, "peak": peak})

    def history(self) -> list[dict[str, Any]]:
        """The last requests, oldest first.

        Each has ``kind``, ``at`` (seconds since 1970), ``seconds``, bytes ``before`` and ``after`` it and at its
        ``peak``, and ``phases``: the same of each, with ``start`` in seconds since the request's beginning.
        """
        return [{**one, "phases": [dict(phase) for phase in one["phases"]]} for one in list(self._requests)]
