"""Giving freed memory back to the system while large weights are replaced one by one."""

from __future__ import annotations

import ctypes

EVERY = 16  # replaced matrices between two calls: 30 ms each on a process of 4 GB


def give_back() -> None:
    """Return free pages of the heap to the system, where the C library can (glibc).

    Once a program has freed a few large blocks, glibc takes blocks of up to 32 MB from its heap, and keeps them when
    they are freed: a gigabyte of replaced matrices stays resident beside the new ones.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return  # another C library
    trim(0)
