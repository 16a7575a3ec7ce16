"""Streams and events of the simulated machine: who has waited for what, and which pinned copies have arrived."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .machine import Machine

GARBAGE = -77_777  # what pinned memory holds until a copy has arrived


class Stream:
    """``torch.cuda.Stream``: work in order. ``copies``: those to pinned memory that the host may not see yet."""

    machine: Machine
    alive: weakref.WeakSet = weakref.WeakSet()

    def __init__(self, device: Any = None, priority: int = 0):
        self.device_index = self.machine.index(device)
        self.device = torch.device("cuda", self.device_index)
        self.clock = 0
        self.copies: list[tuple[int, Tensor, Tensor]] = []
        self.behind: list[tuple[int, Stream, int]] = []  # from when on: behind which stream's work
        Stream.alive.add(self)

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            self.behind.append((self.clock, event.stream, event.clock))

    def wait_stream(self, other: Stream) -> None:
        self.behind.append((self.clock, other, other.clock))

    def record_event(self, event: Event | None = None) -> Event:
        event = self.machine.Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.machine.wait("stream.synchronize", self.device_index)
        self.flush()

    def query(self) -> bool:
        return not self.copies

    def download(self, target: Tensor, value: Tensor) -> None:
        """A copy to pinned memory: garbage until this stream is waited for."""
        self.clock += 1
        self.copies.append((self.clock, target, value))
        with torch.inference_mode():  # which may write to tensors of either mode
            target.fill_(True if target.dtype == torch.bool else GARBAGE)

    def flush(self, upto: int | None = None) -> None:
        """The host has waited for the work up to a time, and for what that work waited for."""
        upto = self.clock if upto is None else upto
        for _, target, value in [copy for copy in self.copies if copy[0] <= upto]:
            with torch.inference_mode():
                target.copy_(value)
        self.copies = [copy for copy in self.copies if copy[0] > upto]
        behind, self.behind = [one for one in self.behind if one[0] <= upto], [x for x in self.behind if x[0] > upto]
        for _, stream, clock in behind:
            stream.flush(clock)


class Event:
    """``torch.cuda.Event``: belongs to the device of the stream that it is first recorded on."""

    machine: Machine

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self.timing = enable_timing
        self.stream: Stream | None = None
        self.clock = 0
        self.machine.count("events")

    def record(self, stream: Stream | None = None) -> None:
        stream = self.machine.stream(self.machine.current) if stream is None else stream
        if self.stream is not None and self.stream.device_index != stream.device_index:
            raise RuntimeError(f"Event device {self.stream.device} does not match recording stream's {stream.device}.")
        self.stream, self.clock = stream, stream.clock

    def synchronize(self) -> None:
        if self.stream is None:
            return
        self.machine.refuse_in_capture("event.synchronize")
        self.machine.count("event_waits")
        self.stream.flush(self.clock)

    def query(self) -> bool:
        return self.stream is None or not any(clock <= self.clock for clock, _, _ in self.stream.copies)

    def wait(self, stream: Stream | None = None) -> None:
        (self.machine.stream(self.machine.current) if stream is None else stream).wait_event(self)

    def elapsed_time(self, other: Event) -> float:
        if not (self.timing and other.timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self.stream is None or other.stream is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        if self.stream.device_index != other.stream.device_index:
            raise RuntimeError("Events are on different devices.")
        return 1.0 + other.clock - self.clock
