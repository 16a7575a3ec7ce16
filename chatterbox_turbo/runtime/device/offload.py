"""Which parts of a model are in a device's memory: what a phase needs, and between requests what the mode says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from .. import forks
from .transfers import Transfers

VOICE = "voice"  # what encodes a reference voice
SPEAKING = ("t3", "flow", "vocoder")  # phases of a request, in order
REST = ""


class Place(Protocol):
    """A part of a model that can leave its device's memory. Each verb may be repeated, and goes on where it failed.

    Attributes:
        nbytes: what leaves.
    """

    nbytes: int

    def leave(self) -> int:
        """Go; bytes that went."""

    def arrive(self) -> int:
        """Be there when this returns, or for the work that the device does next; bytes that came."""

    def expect(self) -> None:
        """Be ready soon: the phase after this one needs the part."""

    def restore(self) -> None:
        """Be in ordinary memory of the device, for good."""


@dataclass
class Moves:
    """What one request moved."""

    left: int = 0
    came: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.left / 2**20:.0f} MiB left, {self.came / 2**20:.0f} MiB came back, in {self.seconds * 1e3:.0f} ms"
        )


@dataclass(frozen=True)
class Pressure:
    """When ``adaptive`` goes from idle to sequential, and back.

    Attributes:
        free: (bytes free, bytes in all) of the device.
        below: share of memory; with less of it free, sequential begins.
        again: with more of it free even after all parts have come back, sequential ends.
        busy: whether something that outlasts a request computes with parts where they are now: then all stays so.
    """

    free: Callable[[], tuple[int, int]]
    below: float
    again: float
    busy: Callable[[], bool] = lambda: False


class Residence:
    """The parts of one model under a policy. Its caller holds the model's lock.

    Args:
        places: by phase; a phase without one needs nothing that leaves.
        sequential: whether speaking parts leave too, each there in its phase only.
        transfers: for the record.
        pressure: makes it adaptive.
        prefetch: have the next phase's part on its way while a phase computes.
        moving: called before parts move, and the function that it returns afterwards.
        switching: called with all parts away, before sequential begins (true) or ends.

    Attributes:
        sequential: as it is now.
        last: what the last request moved.
        lowered: how often sequential has begun.
        reason: why it did the last time, while it lasts.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        sequential: bool,
        transfers: Transfers,
        pressure: Pressure | None = None,
        prefetch: bool = True,
        moving: Callable[[], Callable[[], None]] = lambda: lambda: None,
        switching: Callable[[bool], None] = lambda sequential: None,
    ):
        self.places, self.sequential, self._transfers = dict(places), sequential, transfers
        self._pressure, self._prefetch, self._moving = pressure, prefetch, moving
        self._switching = switching
        self._depth, self._phase = 0, REST
        self._before = sequential  # it came home
        self.last, self.lowered = Moves(), 0
        self.reason = ""

    @contextmanager
    def call(self) -> Iterator[None]:
        """A request in the body; after the outermost one, errors and interrupts included, parts are where they rest."""
        if not self._depth:
            self.last = Moves()
            self._adapt()
        depth = self._depth
        try:
            with forks.undoing(partial(setattr, self, "_depth", depth)):
                self._depth = depth + 1
                yield
        finally:
            if not self._depth:
                self._settle(REST)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What a phase needs is there in the body, and until another phase begins or the request ends."""
        with self.call():
            self.enter(name)
            yield

    def enter(self, name: str) -> None:
        """Begin a phase."""
        if name != self._phase:
            self._settle(name)

    def begin(self) -> None:
        """Have every part where it is between requests, for the first time."""
        if self.sequential:
            self._switch(True)
        else:
            self._settle(REST)

    def lower(self, reason: str) -> bool:
        """Go on in the next lower mode, if this is adaptive and there is one."""
        if self._pressure is None or self.sequential:
            return False
        self.reason, self.lowered = reason, self.lowered + 1
        self._switch(True)
        return True

    def come_home(self) -> None:
        """Have every part in memory of its own, where its weights may be changed; all of them, or none."""
        self._before = self.sequential
        try:
            if self.sequential:
                self._switching(False)
            self.sequential = False
            self._every([place.arrive for place in self.places.values()])
        except BaseException:
            self.leave_again()
            raise

    def leave_again(self) -> None:
        """Have every part where it was before it came home; others may have given its weights other memory there."""
        if self._before:
            self._switch(True)
        else:
            self._settle(REST)

    def restore(self) -> None:
        """Put every part into ordinary memory; all of them, whatever fails on the way."""
        self._every([place.restore for place in self.places.values()])
        self.places = {}

    def _stays(self, name: str) -> bool:
        """Whether a part is there in every phase."""
        return name != VOICE and not self.sequential

    def _settle(self, phase: str) -> None:
        there = [name for name in self.places if self._stays(name) or name == phase]
        self._phase = REST  # where a move fails, the next phase moves again
        moved = self._moving()
        try:
            # first what goes: there may be no room for both
            self._every([self._move(name, "leave") for name in self.places if name not in there])
            self._every([self._move(name, "arrive") for name in there])
        finally:
            moved()
        self._phase = phase
        if self._prefetch and (following := self._following(phase)) is not None:
            self.places[following].expect()

    def _following(self, phase: str) -> str | None:
        if not self.sequential or phase not in SPEAKING:
            return None
        rest = SPEAKING[SPEAKING.index(phase) + 1 :]
        return next((name for name in rest if name in self.places), None)

    def _move(self, name: str, verb: str) -> Callable[[], None]:
        def move() -> None:
            start = time.perf_counter()
            size = getattr(self.places[name], verb)()
            seconds = time.perf_counter() - start
            self.last.seconds += seconds
            if size:
                if verb == "leave":
                    self.last.left += size
                else:
                    self.last.came += size
                self._transfers.record(f"{name} {'leaves' if verb == 'leave' else 'arrives'}", size, seconds)

        return move

    @staticmethod
    def _every(actions: Sequence[Callable[[], Any]]) -> None:
        """All of them; the first failure is raised afterwards."""
        failures = []
        for action in actions:
            try:
                action()
            except BaseException as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _adapt(self) -> None:
        if self._pressure is None or self._pressure.busy():
            return
        free, total = self._pressure.free()
        if not self.sequential and free < self._pressure.below * total:
            self.lower(f"{free / 2**20:.0f} MiB were free")
        elif self.sequential:
            coming = sum(place.nbytes for name, place in self.places.items() if name in SPEAKING)
            if free - coming > self._pressure.again * total:
                self.reason = ""
                self._switch(False)

    def _switch(self, sequential: bool) -> None:
        self.sequential = True
        self._settle(REST)
        self._switching(sequential)
        self.sequential = sequential
        self._settle(REST)
