"""Threads that compute: what running numba's kernels needs, and a thread that leaves no pool behind."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

from ...errors import describe
from .. import forks

T = TypeVar("T")
_ONE_AT_A_TIME = forks.lock()


def apart(function: Callable[[], T]) -> T:
    """What a function gives in a thread of its own, which ends.

    GNU OpenMP keeps a pool for each thread that has computed. Where all pools together have more threads than there are
    processors, theirs no longer wait awake between two products, and the system wakes them for each: a request of Turbo
    on two cores takes a quarter longer once another thread than the one that loads the model speaks.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="loading", daemon=True)
    thread.start()
    try:
        return outcome.result()
    finally:
        if outcome.done():  # an interrupt does not wait for it
            thread.join()


def why_no_kernels() -> str:
    """Why kernels cannot be compiled here, or an empty string."""
    try:
        import numba
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return "numba is not installed (librosa brings it: pip install numba)"
        return f"numba cannot be imported ({describe(error)})"
    except (ImportError, OSError) as error:  # a NumPy that is too new for it, a library of LLVM's that cannot be loaded
        return f"numba cannot be imported ({describe(error)})"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else ""


@contextmanager
def kernel_threads() -> Iterator[int]:
    """As many threads as torch uses, torch's and numba's numbers as before afterwards; one at a time where needed."""
    import numba

    before, callers = torch.get_num_threads(), numba.get_num_threads()
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
            numba.set_num_threads(callers)
            if torch.get_num_threads() != before:  # numba sets it for the OpenMP runtime that both share
                forks.set_threads(before)
