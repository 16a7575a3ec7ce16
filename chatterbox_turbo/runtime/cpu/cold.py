"""Weights of the host below which lies a file: their resident pages can go, and come back when they are touched.

Tensors keep their values, and after the first time their addresses as well. Nothing that was made of them has to be
made again. A mapping is private: what its owner writes to a weight stays in that page, which is never let go.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import TurboError, describe
from .host_memory import give_back, release_mapped

PAGE = mmap.PAGESIZE
ALIGNMENT = 64  # bytes, as PyTorch's own allocator has them
PAGEMAP, MAPS, MOUNTS = Path("/proc/self/pagemap"), Path("/proc/self/maps"), Path("/proc/mounts")
_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61  # Documentation/admin-guide/mm/pagemap.rst
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
CHUNK = 2**24  # bytes written at once


def why_not() -> str:
    """Why pages cannot be let go here; empty where they can."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_DONTNEED"):
        return "on a CPU it needs Linux, whose pages of a mapped file can be let go"
    try:
        with open(PAGEMAP, "rb", buffering=0) as file:
            file.read(8)
    except OSError as error:
        return f"{PAGEMAP}, which tells pages that somebody has written to, cannot be read ({describe(error)})"
    return ""


def spill_folder(wanted: str | None = None) -> tuple[Path | None, str]:
    """A folder on a disk for what has no file yet; or ``None`` and why.

    Args:
        wanted: this one and no other; by default that of temporary files or, where that is memory, ``/var/tmp``.
    """
    for path in [Path(wanted)] if wanted else [Path(tempfile.gettempdir()), Path("/var/tmp")]:
        if not path.is_dir() or not os.access(path, os.W_OK):
            reason = f"{path} is no folder that can be written to"
        elif _kind_of(path) in IN_MEMORY:
            reason = f"{path} is memory itself ({_kind_of(path)})"
        else:
            return path, ""
    return None, f"{reason}; set offload.folder to one on a disk"


def _kind_of(path: Path) -> str:
    """The file system that a folder is on."""
    best, kind = "", ""
    with suppress(OSError):
        for line in MOUNTS.read_text().splitlines():
            _, point, name, *_ = line.split()
            point = point.replace("\\040", " ")
            inside = point == "/" or str(path.resolve()) == point or str(path.resolve()).startswith(point + "/")
            if inside and len(point) >= len(best):
                best, kind = point, name
    return kind


class ColdPages:
    """Tensors over a private mapping of a file, in place of the memory that they had.

    Weights that lie in a mapped checkpoint stay where they are. All others are written once to a file without a name in
    ``folder``, whose room on the disk is free again when the last of them has gone.

    Args:
        tensors: parameters and buffers; those that share a storage go on sharing one.

    Attributes:
        nbytes: of the storages that can go.
        spilled: of them, in the file without a name.

    Raises:
        TurboError: the file cannot be written (no room on the disk); the tensors are where they were.
    """

    def __init__(self, tensors: Iterable[Tensor], folder: Path):
        groups: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            # nobody can give an inference tensor another storage
            if tensor.device.type == "cpu" and not tensor.is_inference():
                groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        filled = [some for some in groups.values() if some[0].untyped_storage().nbytes()]
        mapped = _mapped_ranges()
        here = [some for some in filled if _lies_in(_bytes(some[0]), mapped)]
        self._moved = [some for some in filled if not _lies_in(_bytes(some[0]), mapped)]
        self.spilled = sum(some[0].untyped_storage().nbytes() for some in self._moved)
        self._addresses: list[int] = []
        self._spans = [_whole_pages(_bytes(some[0])) for some in here]
        if self._moved:
            self._spans.append(self._spill(folder))
        self.nbytes = sum(size for _, size in self._spans)

    def _spill(self, folder: Path) -> tuple[int, int]:
        sizes = [some[0].untyped_storage().nbytes() for some in self._moved]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        total = -(-starts[-1] // PAGE) * PAGE
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, total)  # now, or a full disk would end the process later
                for some, start in zip(self._moved, starts, strict=False):
                    file.seek(start)
                    _write(file, _bytes(some[0]))
                file.flush()
                rights = mmap.PROT_READ | mmap.PROT_WRITE
                mapping = mmap.mmap(file.fileno(), total, flags=mmap.MAP_PRIVATE, prot=rights)
        except OSError as error:
            raise TurboError(
                f"Cannot write {total / 2**20:.0f} MiB of weights to a file in {folder}: {describe(error)}.",
                "Weights that leave memory need a file to come back from.",
                "Make room there, set offload.folder to another one, or offload.enabled = false.",
            ) from error
        for some, start, size in zip(self._moved, starts, sizes, strict=False):
            # one storage each, or saving a single weight would save them all
            storage = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=start)
            for tensor in some:
                _put(tensor, storage)
            self._addresses.append(storage.data_ptr())
        give_back()
        return self._addresses[0], total

    def drop(self) -> int:
        """Let go of every resident page that its file can bring back; bytes that were."""
        return sum(_drop(address, size) for address, size in self._spans)

    def resident(self) -> int:
        """Bytes that are in memory."""
        return sum(
            int(((_flags(address, size) & np.uint64(_PRESENT)) != 0).sum()) * PAGE for address, size in self._spans
        )

    def expect(self) -> None:
        """Have the system read what it has not in its cache, while something else computes."""
        advice = getattr(mmap, "MADV_WILLNEED", None)
        madvise = ctypes.CDLL(None).madvise
        for address, size in self._spans if advice is not None else ():
            madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice))

    def restore(self) -> None:
        """Give the tensors that are still over the file ordinary memory again, with the values that they have."""
        for some, address in zip(self._moved, self._addresses, strict=True):
            still = [tensor for tensor in some if tensor.untyped_storage().data_ptr() == address]
            if still:
                storage = _bytes(still[0]).clone()
                for tensor in still:
                    _put(tensor, storage)
        self._moved, self._addresses, self._spans, self.nbytes = [], [], [], 0


def resident(storages: Iterable[tuple[int, int]]) -> int:
    """Bytes in memory of some (address, bytes), whole pages counted; all of them where the system does not tell."""
    try:
        return sum(_present(address, size) for address, size in storages)
    except OSError:
        return sum(size for _, size in storages)


def _present(address: int, size: int) -> int:
    if size < PAGE:
        return size
    start = address // PAGE * PAGE
    flags = _flags(start, -(-(address + size - start) // PAGE) * PAGE)
    return min(size, int(((flags & np.uint64(_PRESENT)) != 0).sum()) * PAGE)


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _put(tensor: Tensor, storage: Tensor) -> None:
    """The same view of another storage."""
    view = torch.empty(0, dtype=tensor.dtype).set_(
        storage.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    tensor.data = view


def _whole_pages(storage: Tensor) -> tuple[int, int]:
    """First whole page and bytes of the whole pages of a storage."""
    start = -(-storage.data_ptr() // PAGE) * PAGE
    return start, max((storage.data_ptr() + storage.nbytes) // PAGE * PAGE - start, 0)


def _write(file, storage: Tensor) -> None:
    view = memoryview(storage.numpy())
    for start in range(0, len(view), CHUNK):
        file.write(view[start : start + CHUNK])


def _mapped_ranges() -> list[tuple[int, int]]:
    """Private mappings of files with a name, which can be read again."""
    found = []
    for line in MAPS.read_text().splitlines():
        span, rights, _, _device, inode, *path = line.split(maxsplit=5)
        if rights.endswith("p") and inode != "0" and path and not path[0].endswith("(deleted)"):
            start, end = (int(part, 16) for part in span.split("-"))
            found.append((start, end))
    return found


def _lies_in(storage: Tensor, ranges: Sequence[tuple[int, int]]) -> bool:
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes
    return any(first <= start and end <= last for first, last in ranges)


def _flags(address: int, size: int) -> np.ndarray:
    """What the system says of each page."""
    count = size // PAGE
    with open(PAGEMAP, "rb", buffering=0) as file:
        found = os.pread(file.fileno(), 8 * count, 8 * (address // PAGE))
    return np.frombuffer(found, dtype=np.uint64)


def _drop(address: int, size: int) -> int:
    if size <= 0:
        return 0
    flags, bit = _flags(address, size), np.uint64
    present = (flags & bit(_PRESENT)) != 0
    # what somebody has written to a private mapping exists in its page alone
    written = (present | ((flags & bit(_SWAPPED)) != 0)) & ((flags & bit(_OF_A_FILE)) == 0)
    for first, last in _runs(~written):
        release_mapped(address + first * PAGE, (last - first) * PAGE)
    return int((present & ~written).sum()) * PAGE


def _runs(wanted: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and end of each stretch of pages that are wanted."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


class ColdPart:
    """A part of a model on a CPU that leaves by letting its pages go, and comes back page by page as it is touched.

    ``tensors``: its parameters and buffers; they get their file when the part leaves for the first time.
    """

    def __init__(self, tensors: Sequence[Tensor], folder: Path):
        self._tensors, self._folder = list(tensors), folder
        self.pages: ColdPages | None = None
        self.nbytes = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def leave(self) -> int:
        """Let the pages go; bytes that went."""
        if self.pages is None:
            self.pages = ColdPages(self._tensors, self._folder)
            return self.pages.spilled + self.pages.drop()
        return self.pages.drop()

    def arrive(self) -> int:
        """Nothing to wait for: the processor fetches what it touches."""
        return 0

    def expect(self) -> None:
        """Have the file read into the system's cache, where it is not there any more."""
        if self.pages is not None:
            self.pages.expect()

    def restore(self) -> None:
        """Ordinary memory again."""
        if self.pages is not None:
            self.pages.restore()
        self.pages = None
