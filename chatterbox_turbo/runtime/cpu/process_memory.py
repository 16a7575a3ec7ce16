"""Readings of this process's memory and of the machine's; ``None`` where none can be had.

Each takes some microseconds, what is ``available`` up to a millisecond where control groups have to be read.

Resident memory is what of a process lies in RAM. Its highest value since the start is a counter of the kernel's
(VmHWM); Linux lets it begin anew through ``/proc/self/clear_refs``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import control_groups

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # of proc(5): VmHWM becomes VmRSS; no page is touched


@dataclass(frozen=True)
class Resident:
    """Bytes of this process in RAM: now, at most so far, and of now what files back and what nothing does."""

    now: int
    peak: int | None = None
    files: int | None = None
    anonymous: int | None = None


@dataclass(frozen=True)
class Heap:
    """What glibc's ``malloc`` holds, in bytes.

    ``heap``: its heaps; ``in_use`` and ``free``: parts of them (of what is free, pages may have been given back
    already); ``mapped``: large blocks outside of them, each of which goes when it is freed.
    """

    heap: int
    in_use: int
    free: int
    mapped: int

    @property
    def fragmentation(self) -> float:
        """The share of the heaps that is free, and kept."""
        return self.free / self.heap if self.heap else 0.0

    def to_dict(self) -> dict[str, float]:
        """As plain values."""
        return {**asdict(self), "fragmentation": self.fragmentation}


class _Mallinfo(ctypes.Structure):
    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def resident() -> Resident | None:
    """This process's resident memory, by Linux; elsewhere by psutil, without the peak."""
    found = dict(_entries(STATUS))
    if "VmRSS" in found:
        return Resident(*(found.get(name) for name in ("VmRSS", "VmHWM", "RssFile", "RssAnon")))  # type: ignore[arg-type]
    try:
        import psutil  # an optional package
    except ImportError:
        return None
    return Resident(psutil.Process().memory_info().rss)


def reset_peak() -> bool:
    """Let the peak begin anew, for the whole process; whether the system let it."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def heap() -> Heap | None:
    """What the C library holds, where it is glibc 2.33 or newer."""
    mallinfo2 = _mallinfo2()
    if mallinfo2 is None:
        return None
    info = mallinfo2()
    return Heap(info.arena, info.uordblks, info.fordblks, info.hblkhd)


def available(root: Path = control_groups.ROOT) -> tuple[int, int] | None:
    """Bytes that can still be had without swapping, and all that there are: the machine's, or its control groups'.

    Args:
        root: of the file system.
    """
    found = dict(_entries(root / "proc/meminfo"))
    try:
        free, total = found["MemAvailable"], found["MemTotal"]
    except KeyError:
        return _by_psutil()
    for group in control_groups.groups(root):
        free, total = min(free, group.free), min(total, group.limit)
    return free, total


def _by_psutil() -> tuple[int, int] | None:
    try:
        import psutil  # an optional package
    except ImportError:
        return None
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _entries(path: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the lines ``name: number kB``."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        name, *values = line.replace(":", " ").split()
        if values and values[0].isdigit():
            yield name, int(values[0]) * 1024


@functools.cache
def _mallinfo2():
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return None
    function.restype = _Mallinfo
    return function
