"""What running numba's kernels needs: numba itself, and as many of its threads as torch has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from . import forks

_ONE_AT_A_TIME = forks.lock()


def why_no_kernels() -> str:
    """Why kernels cannot be compiled here, or an empty string."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return "numba is not installed (librosa brings it: pip install numba)"
    return ""


@contextmanager
def kernel_threads() -> Iterator[int]:
    """As many threads as torch uses, and torch's number unchanged afterwards; one caller at a time where needed."""
    import numba

    before = torch.get_num_threads()
    threads = min(before, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    try:
        pool = numba.threading_layer()
    except ValueError:  # not started yet
        pool = ""
    # numba ends the process when two threads enter its own pool; OpenMP and TBB have no such limit
    with nullcontext() if pool in ("omp", "tbb") else _ONE_AT_A_TIME:
        try:
            yield threads
        finally:
            if torch.get_num_threads() != before:  # numba sets it for the OpenMP runtime that both share
                forks.set_threads(before)
