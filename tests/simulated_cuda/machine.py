"""What the simulated machine remembers: devices, what has happened, streams and events."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .streams import Event, Stream

NOT_PLACES = (str(Path(__file__).parent), "/torch/", "/wrapt/", "contextlib.py", "<frozen", "<string>", "threading.py")
WAITS = ("sync", "host_to_device")


class ForbiddenSync(AssertionError):
    """The host waited for the device where ``forbid_syncs`` rules."""


@dataclass(frozen=True)
class Happening:
    """``place``: the three innermost lines outside of torch, innermost first."""

    kind: str
    what: str
    place: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} at {self.place}"


@dataclass
class Watch:
    """What has happened in one stretch of time."""

    recorded: list[Happening] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    by_op: Counter = field(default_factory=Counter)

    @property
    def waits(self) -> list[Happening]:
        """Where the host waited for the device."""
        return [one for one in self.recorded if one.kind in WAITS]


class CudaGenerator(torch.Generator):
    """A generator of a simulated device: random numbers of the CPU's, with the rules of a GPU's.

    ``capturing``: the graph that is being captured and has it registered, or ``None``. ``made``: by their address, as
    an operation is handed a plain ``torch.Generator`` in place of a subclass.
    """

    made: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def __new__(cls, device: Any = "cpu") -> Any:
        device = torch.device(device)
        made = super().__new__(cls, "cpu")
        made.place, made.capturing = device, None
        cls.made[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        return self.place


class Machine:
    """``devices`` alike, the first current in every thread until it changes that."""

    def __init__(self, devices: int = 2, capability: tuple[int, int] = (9, 0)):
        self.devices, self.capability, self.tf32 = devices, capability, False
        self.memory = 80 * 2**30
        self._reset_allocator()
        self.total = Watch()
        self.graphs: weakref.WeakSet = weakref.WeakSet()
        self.capturing: Any = None  # the graph that is being captured
        self.recording_pool: Any = None  # where the allocator puts what is captured
        self.pinned: dict[int, Tensor] = {}  # by address; they live as long as the machine, so addresses are unique
        self.generators = [CudaGenerator(torch.device("cuda", index)) for index in range(devices)]
        for index, generator in enumerate(self.generators):
            generator.manual_seed(1234 + index)
        self.sync_debug_mode = 0
        self._watches: list[Watch] = []
        self._forbidden = 0
        self._failures = 0
        self._local = threading.local()
        self.Stream, self.Event = (type(one.__name__, (one,), {"machine": self}) for one in (Stream, Event))
        self.default_streams = [self.Stream(index) for index in range(devices)]

    @property
    def recorded(self) -> list[Happening]:
        return self.total.recorded

    @property
    def counts(self) -> Counter:
        return self.total.counts

    @property
    def by_op(self) -> Counter:
        return self.total.by_op

    @property
    def captures(self) -> int:
        return self.counts["captures"]

    @property
    def replays(self) -> int:
        return self.counts["replays"]

    @property
    def current(self) -> int:
        """The index of this thread's current device."""
        return getattr(self._local, "current", 0)

    @current.setter
    def current(self, index: int) -> None:
        self._local.current = index

    def index(self, device: Any) -> int | None:
        """The index of a CUDA device, or ``None`` of another kind; given as index, name or ``torch.device``."""
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        device = torch.device(device)
        if device.type != "cuda":
            return None
        index = self.current if device.index is None else device.index
        if index >= self.devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return index

    def stream(self, index: int) -> Stream:
        """This thread's current stream of a device."""
        return getattr(self._local, "streams", {}).get(index, self.default_streams[index])

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        """``torch.cuda.stream``: makes the stream and its device current."""
        if stream is None:
            yield
            return
        streams, device = getattr(self._local, "streams", {}), self.current
        self._local.streams, self._local.current = {**streams, stream.device_index: stream}, stream.device_index
        try:
            yield
        finally:
            self._local.streams, self._local.current = streams, device

    def forget(self) -> None:
        """Forget everything that has been recorded and counted."""
        self.total, self._failures = Watch(), 0
        self._reset_allocator()

    def _reset_allocator(self) -> None:
        """What it says of itself, in bytes, whatever the tensors are; and how often its cache was emptied."""
        self.free, self.reserved, self.allocated, self.peak, self.inactive = 60 * 2**30, 2**21, 2**20, 2**21, 0
        self.segments: list[dict[str, Any]] = []
        self.emptied = 0

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """What happens in the body."""
        watch = Watch()
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches = [one for one in self._watches if one is not watch]

    @contextmanager
    def forbid_syncs(self) -> Iterator[None]:
        """The first wait of the host in the body raises ``ForbiddenSync``."""
        self._forbidden += 1
        try:
            yield
        finally:
            self._forbidden -= 1

    def fail_captures(self, number: int) -> None:
        """So many captures from now on fail at their second operation."""
        self._failures = number

    def capture_fails(self) -> bool:
        """Whether this one is to fail."""
        self._failures -= 1
        return self._failures >= 0

    def in_capture(self, index: int | None = None) -> bool:
        """Whether this thread's current stream is being captured."""
        graph = self.capturing
        return graph is not None and self.stream(graph.index if index is None else index) is graph.stream

    def refuse_in_capture(self, what: str) -> None:
        """Raise where this thread's current stream is being captured, which spoils the capture."""
        if self.in_capture():
            self.capturing.spoiled = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def note(self, kind: str, what: str) -> None:
        """Record something."""
        happening = Happening(kind, what, _place())
        for watch in (self.total, *self._watches):
            watch.recorded.append(happening)
        self.count(kind)

    def count(self, name: str, number: int = 1, op: str = "") -> None:
        """Count something, and by operation where it is a kernel."""
        for watch in (self.total, *self._watches):
            watch.counts[name] += number
            if name in ("kernels", "replays"):
                watch.counts["launches"] += number
            if op:
                watch.by_op[op] += number

    def wait(self, what: str, index: int | None = None, kind: str = "sync") -> None:
        """The host waits for this thread's current stream of a device; pinned copies in it have arrived then."""
        index = self.current if index is None else index
        self.refuse_in_capture(what)
        self.note(kind, what)
        if self._forbidden:
            raise ForbiddenSync(str(self.recorded[-1]))
        if self.sync_debug_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.sync_debug_mode == 1:
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=_depth())
        self.stream(index).flush()

    def synchronize(self, device: Any = None) -> None:
        """``torch.cuda.synchronize``."""
        index = self.index(device)
        self.refuse_in_capture("synchronize")
        if self.capturing is not None and self.capturing.index == index:  # by another thread
            self.capturing.spoiled = True
            raise RuntimeError("CUDA error: operation not permitted when a stream of the device is capturing")
        self.count("synchronize")
        for stream in list(Stream.alive):
            if stream.device_index == index and stream.machine is self:
                stream.flush()

    def generator_for(self, given: Any, index: int) -> CudaGenerator:
        """The generator that a kernel draws from.

        Raises:
            RuntimeError: it belongs elsewhere, or a capture is going on that has or has not registered it.
        """
        generator = self.generators[index] if given is None else given
        generator = CudaGenerator.made.get(generator._cdata, generator)
        if not isinstance(generator, CudaGenerator) or self.index(generator.device) != index:
            raise RuntimeError(f"Expected a cuda:{index} generator, found one of {generator.device}")
        if self.in_capture(index) and generator.capturing is not self.capturing:
            self.capturing.spoiled = True
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        if not self.in_capture(index) and generator.capturing is not None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return generator


def _frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _foreign(frame: Any) -> bool:
    return not any(part in frame.f_code.co_filename for part in NOT_PLACES)


def _place() -> str:
    places = [f"{_short(f.f_code.co_filename)}:{f.f_lineno}" for f in _frames() if _foreign(f)]
    return " < ".join(places[:3])


def _short(path: str) -> str:
    for part in ("/site-packages/", "/chatterbox_turbo/", "/tests/"):
        if part in path:
            return ("" if part == "/site-packages/" else part[1:]) + path.rpartition(part)[2]
    return path


def _depth() -> int:
    """The ``stacklevel`` of a warning that names the innermost line outside of torch."""
    return next((level for level, frame in enumerate(_frames(), 1) if _foreign(frame)), 1)
