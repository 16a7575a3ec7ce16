"""Numbers among the arguments of a request: what is meant, or a refusal in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import InvalidRequestError, brief


@dataclass(frozen=True)
class Range:
    """Which finite numbers fit, ends included unless ``open``."""

    words: str
    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and not (self.open and value == self.low)


RANGES = {
    "temperature": Range("0 or more", low=0.0),
    "repetition_penalty": Range("above 0", low=0.0, open=True),
    "min_p": Range("between 0 and 1", 0.0, 1.0),
    "top_p": Range("between 0 and 1", 0.0, 1.0),
    "cfg_weight": Range("0 or more", low=0.0),
    "exaggeration": Range("finite"),
}
WHOLE = ("top_k",)  # 0 and below switch it off


def number(name: str, value: Any) -> float:
    """A number in the range of its name (``RANGES``): Python's, NumPy's, or a tensor without dimensions.

    Raises:
        InvalidRequestError: it is none, not finite, or out of range.
    """
    fitting, given = RANGES[name], _number(value)
    if given is None:
        raise InvalidRequestError(f"{name} is {brief(value)}, but must be a number, {fitting.words}.", "", _OUT)
    if _float(given) not in fitting:
        raise InvalidRequestError(f"{name} is {_float(given)}, but must be {fitting.words}.")
    return _float(given)


def whole(name: str, value: Any) -> int:
    """A whole number; 1000.0 is one.

    Raises:
        InvalidRequestError: it is none.
    """
    given = _number(value)
    if given is None or not math.isfinite(_float(given)) or given != int(given):
        shown = brief(value) if given is None else _float(given)
        raise InvalidRequestError(f"{name} is {shown}, but must be a whole number.", "", _OUT)
    return int(given)


def count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of things.

    Raises:
        InvalidRequestError: it is none, or below ``least``.
    """
    if (given := whole(name, value)) < least:
        raise InvalidRequestError(f"{name} is {given}, but must be {least} or more.")
    return given


def plain(name: str, value: Any) -> Any:
    """An argument of ``generate`` as upstream takes it: numbers of known names as Python's, all others untouched.

    Raises:
        InvalidRequestError: a number that does not fit.
    """
    if name in RANGES:
        return number(name, value)
    return whole(name, value) if name in WHOLE else value


_OUT = "Leave it out for the default."


def _float(given: Real) -> float:
    """As a float; infinite where it is too large for one."""
    try:
        return float(given)
    except OverflowError:
        return math.inf if given > 0 else -math.inf


def _number(value: Any) -> Real | None:
    """Python's number, or ``None``; truth values and text are none."""
    if not isinstance(value, Real) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, Real) and not isinstance(value, bool) else None
