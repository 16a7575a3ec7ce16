"""Memory of the host: giving what is free back to the system, and keeping it where it is needed again at once."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

HEAP_BLOCK = 2**25 - 2**16  # the largest that glibc ever takes from its heap, with its header
HUGE_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")  # bytes of one, where Linux has them
COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which Python has no name for
GAP = 2**16  # bytes between two blocks that an allocator keeps for itself, at most
REFUSALS = 8  # huge pages in a row that the system has no room for, before it is left alone


def gives_back() -> bool:
    """Whether the C library can be asked to return what is free (glibc)."""
    return _trim() is not None


def _trim():
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None  # another C library


def give_back() -> None:
    """Return free pages of the heap to the system, where the C library can (glibc).

    Once a program has freed a few large blocks, glibc takes blocks of up to 32 MB from its heap, and keeps them when
    they are freed: a gigabyte of replaced matrices stays resident beside the new ones.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def keep_freed_blocks() -> None:
    """Let blocks of up to 32 MB come from the heap, whose pages stay with the process when they are freed (glibc).

    glibc maps larger blocks anew each time, and "larger" is what the program has freed so far, 32 MB at most. Fresh
    pages are zeroed at their first touch: for activations of some megabytes that takes as long as computing them.
    """
    block = torch.empty(HEAP_BLOCK, dtype=torch.uint8)
    del block


def reserve(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the host that take memory page by page, as they are written, and give it back when they are freed.

    Not ``torch.zeros``, which writes every page, nor ``numpy.zeros``, which asks for pages of 2 MB.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size or not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.zeros(shape, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    pages = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Lay memory of the host that is read again and again into pages of 2 MB, where the system can; bytes laid so.

    A processor that streams through gigabytes in pages of 4 KB looks up an address for each of them, and its
    prefetchers stop at their ends. Contents and addresses stay; nothing has to be undone, since pages return to the
    system with the memory they hold. Linux 6.1 or newer; elsewhere nothing happens and the answer is 0.
    """
    try:
        size, madvise = int(HUGE_PAGE.read_text()), ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError, TypeError):
        return 0
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.device.type == "cpu")
    laid, refused = 0, 0
    for page in _whole_pages(ranges, size):
        if madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), ctypes.c_int(COLLAPSE)) == 0:
            laid, refused = laid + size, 0
        else:
            refused += 1
        if refused == REFUSALS:
            break
    return laid


def _whole_pages(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[int]:
    """Addresses of the pages that ranges in ascending order fill, but for small gaps."""
    merged: list[list[int]] = []
    for start, end in ranges:
        if merged and start - merged[-1][1] <= GAP:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    for start, end in merged:
        yield from range(-(-start // size) * size, end - size + 1, size)


def release_mapped(address: int, size: int) -> None:
    """Let go of the resident pages of a file mapping that lie whole inside a range of bytes, where the system can.

    The next access reads them from the file again. Elsewhere (Windows) they stay until the mapping goes.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if advice is None or length <= 0:
        return
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
