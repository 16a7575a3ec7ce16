"""How a text is cut: lengths, pauses, what finds sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from ..errors import InvalidRequestError
from .sentences import segmenter

# seconds of silence between two pieces, by what the first one ends at
PAUSES: Mapping[str, float] = MappingProxyType(
    {"word": 0.05, "comma": 0.15, "clause": 0.2, "sentence": 0.3, "paragraph": 0.6, "chapter": 1.0}
)
LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Splitting:
    """How a text is cut.

    Attributes:
        target: seconds of speech that sentences are put together to.
        longest: seconds of speech that no piece is estimated to exceed. T3 stops after 40 s, so that the default leaves
            room for an estimate that is half of what a slow voice needs.
        shortest: a piece of fewer seconds is put together with its neighbour, across the end of a paragraph too (not of
            a chapter): short answers in a dialogue, which a model speaks worse on their own.
        pauses: seconds of silence by boundary; what is not named keeps its default (``PAUSES``).
        boundaries: what finds sentences: ``"sentencex"``, ``"rules"``, ``"auto"``: sentencex where it is installed.
        normalize: numbers, dates, amounts and abbreviations as words, where the language has them (``normalize``).
    """

    target: float = 12.0
    longest: float = 18.0
    shortest: float = 1.0
    pauses: Mapping[str, float] = field(default_factory=dict)
    boundaries: str = "auto"
    normalize: bool = False

    def __post_init__(self):
        for name in ("target", "longest", "shortest"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise InvalidRequestError(f"{name} is {value!r}.", "", "Give seconds.")
        if not 0.5 <= self.target <= self.longest:
            raise InvalidRequestError(
                f"target is {self.target:g} s and longest {self.longest:g} s.",
                "",
                "Pieces have at least half a second, and longest is no less than target.",
            )
        if self.shortest > self.target:
            raise InvalidRequestError(f"shortest is {self.shortest:g} s, more than target.")
        for name, value in self.pauses.items():
            if name not in PAUSES:
                raise InvalidRequestError(f"There is no pause {name!r}.", "", f"Pauses: {', '.join(PAUSES)}.")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value <= LONGEST_PAUSE):
                raise InvalidRequestError(
                    f"The pause {name!r} is {value!r}.", f"It has 0 to {LONGEST_PAUSE:g} seconds."
                )
        object.__setattr__(self, "pauses", MappingProxyType({**PAUSES, **self.pauses}))
        segmenter(self.boundaries)


def chosen(splitting: Splitting | None, changes: Mapping[str, object]) -> Splitting:
    """``splitting``, or the defaults, with ``changes`` to single options."""
    known = [one.name for one in fields(Splitting)]
    for name in changes:
        if name not in known:
            raise InvalidRequestError(f"There is no option {name!r} of splitting.", "", f"Options: {', '.join(known)}.")
    return replace(splitting or Splitting(), **changes)  # type: ignore[arg-type]
