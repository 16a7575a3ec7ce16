"""What is given back to the system or the driver, and when: all of it goes through here, and is counted.

On CUDA and MPS that is PyTorch's cache of freed blocks. On a CPU it is what glibc keeps of freed blocks: once a program
has freed a few large ones, glibc takes blocks of up to 32 MB from its heap, and keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from ...errors import describe
from .. import forks
from ..cpu.host_memory import give_back, gives_back
from ..device import captures
from . import readings

When = Literal["never", "pressure", "between"]

EVERY = 16  # replaced matrices between two clearings: 30 ms each on a process of 4 GB
LONG = 200  # mel frames (4 s): clearing before the vocoder takes 40 ms, of half a second and more that these take
WORTH = 32 * 2**20  # bytes: less is not worth the milliseconds
PAUSE = 10.0  # seconds between two clearings under pressure, which may last
CPU = torch.device("cpu")


@dataclass
class Cleared:
    """The clearings at one place: how many, seconds they took, bytes they gave back, and what kept others away."""

    count: int = 0
    seconds: float = 0.0
    bytes: int = 0
    skipped: int = 0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {key: value for key, value in vars(self).items() if key in ("count", "seconds", "bytes") or value}


class Tally:
    """Clearings by place, from any thread."""

    def __init__(self) -> None:
        self._places: dict[str, Cleared] = {}
        self._lock = forks.lock()  # held for an addition only

    def add(self, place: str, seconds: float, size: int) -> None:
        """Count a clearing."""
        with self._lock:
            one = self._places.setdefault(place, Cleared())
            one.count, one.seconds, one.bytes = one.count + 1, one.seconds + seconds, one.bytes + size

    def skip(self, place: str, reason: str) -> None:
        """Count one that could not be."""
        with self._lock:
            one = self._places.setdefault(place, Cleared())
            one.skipped, one.reason = one.skipped + 1, reason

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """As plain values."""
        with self._lock:
            return {place: one.to_dict() for place, one in self._places.items()}

    def __str__(self) -> str:
        told = []
        for place, one in self.to_dict().items():
            if one["count"]:
                size = f"{one['bytes'] / 2**20:.0f} MiB given back"
                told.append(f"{place} {one['count']} times in {one['seconds']:.3f} s ({size})")
            if "skipped" in one:
                told.append(f"{place} not {one['skipped']} times: {one['reason']}")
        return ", ".join(told)


replacing = Tally()  # of the process: while weights were replaced


def clear(device: torch.device, place: str, tally: Tally) -> None:
    """Give back what nobody uses, and count it.

    The caller is ``computing`` on the device, so that no graph of this package is captured meanwhile; where somebody
    else captures one, whose capture the clearing would break, nothing happens.
    """
    if device.type == "cpu" and not gives_back():
        return
    if device.type == "cuda" and captures.underway():
        return tally.skip(place, "a CUDA graph was being captured")
    start, before = time.perf_counter(), _held(device)
    try:
        _give_back(device)
    except RuntimeError as error:  # somebody else's capture
        return tally.skip(place, describe(error))
    tally.add(place, time.perf_counter() - start, max(0, before - _held(device)))


def replaced(number: int | None = None) -> None:
    """To be called while weights are replaced one by one, with their number, and at the end without.

    In any policy: apply and revert would need the memory of the weights twice otherwise.
    """
    if number is None or number % EVERY == 0:  # and so at the last undo, which is that of number 0
        clear(CPU, "while weights were replaced", replacing)


@dataclass
class CachePolicy:
    """When memory that nobody uses is given back.

    Attributes:
        when: after requests: ``never``, under ``pressure`` (less than ``free_below`` of all memory is free), or
            ``between`` any two.
        vocoder: also before the vocoder of long speech, on a CPU, whose tensors do not fit into the pieces that flow
            matching leaves: 40 ms, and its memory less at the peak.
        tally: what that has cost so far.
    """

    when: When = "never"
    free_below: float = 0.1
    vocoder: bool = False
    tally: Tally = field(default_factory=Tally)
    _last: float = field(default=-PAUSE, repr=False)
    _depth: int = field(default=0, repr=False)

    def before_vocoder(self, device: torch.device, frames: int) -> None:
        """To be called before mel frames become samples."""
        if self.vocoder and device.type == "cpu" and frames >= LONG:
            clear(device, "before the vocoder", self.tally)

    @contextmanager
    def around(self, device: Callable[[], torch.device]) -> Iterator[None]:
        """A request in the body, under its model's lock; errors too leave memory behind.

        Requests within one, as a batch has them, are part of it.
        """
        depth = self._depth
        try:
            with forks.undoing(partial(setattr, self, "_depth", depth)):
                self._depth = depth + 1
                yield
        finally:
            if not self._depth:
                self.after(device())

    def after(self, device: torch.device) -> None:
        """To be called after a request."""
        if self.when == "between":
            clear(device, "between requests", self.tally)
        elif self.when == "pressure" and self._pressed(device):
            self._last = time.monotonic()
            clear(device, "under pressure", self.tally)

    def _pressed(self, device: torch.device) -> bool:
        if time.monotonic() - self._last < PAUSE:
            return False
        found = readings.free(device)
        if found is None or found[0] >= self.free_below * found[1]:
            return False
        idle = readings.idle(device)
        return idle is None or idle >= WORTH


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return torch.mps.driver_allocated_memory() if device.type == "mps" else readings.level(device)


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        give_back()
