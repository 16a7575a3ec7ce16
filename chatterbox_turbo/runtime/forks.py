"""Children of ``os.fork``: what of this process's locks and thread pools goes on in them.

A child has one thread, that which forked. A lock that another thread held stays locked in it. And GNU OpenMP, by which
torch and numba compute on Linux, keeps a pool for each thread that has computed: the child's one waits for the others
of its pool, which are gone, for ever. So that thread computes alone in the child. Threads that the child starts make
pools of their own, and have as many threads as before.

Such a pool ends after the thread it computed for, when ``join`` has long returned; libgcc's unwinder, which ends its
threads, takes a lock of its own once numba has compiled anything (up to GCC 12). A child that inherits it locked waits
for ever when it compiles, throws a C++ exception or ends a pool. So who forks waits until no thread is ending.

What another thread was in the midst of never ends in the child: no ``finally`` of it runs there. So what is changed
for a while, and other threads see, is changed in an ``undoing`` block, and the child carries out its undo.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
_blocks: dict[object, tuple[int, Callable[[], object]]] = {}  # by entry: thread and undo, innermost last
_held: list[Any] = []  # numba's locks, while this process forks
_TASKS = Path("/proc/self/task")  # of Linux: a folder for each thread
_ENDING = 2 / 100  # seconds of its own time, at most, that a thread takes to end: it takes well under a millisecond
_PATIENCE = 1.0  # seconds without numba's compiler after which this process forks even so, as threads end all the time
_others = 0  # threads of torch for all but the thread that forked; 0 where no thread computes alone


def lock() -> threading.RLock:
    """A lock that is free in a child, unless the thread that forked holds it."""
    made = threading.RLock()
    _locks.add(made)
    return made


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Have ``undo`` called after the body; and in a child that another thread forks meanwhile, where no body ends.

    Args:
        undo: right at any point of the body, and a second time: it puts back a value, and counts nothing down. In a
            child it finds every lock made here free.
    """
    with halted(undo):
        try:
            yield
        finally:
            undo()


@contextmanager
def halted(undo: Callable[[], object]) -> Iterator[None]:
    """Have ``undo`` called in children alone that another thread forks during the body, for what the body completes."""
    entry = object()
    _blocks[entry] = threading.get_ident(), undo
    try:
        yield
    finally:
        del _blocks[entry]


@functools.cache
def prepare() -> None:
    """From now on a child of this process can compute, and take the locks made here."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_wait, after_in_parent=_go_on, after_in_child=_begin)


def set_threads(count: int) -> None:
    """``torch.set_num_threads`` for the calling thread, which leaves those to come in a child what they have."""
    torch.set_num_threads(count)
    if _others:  # torch gives a new thread the number that was set last, by whichever thread
        another = threading.Thread(target=torch.set_num_threads, args=(_others,))
        another.start()
        another.join()


def remark() -> str:
    """What is different in this process because it was forked, or an empty string."""
    if not _others:
        return ""
    return (
        "forked from one that had computed: the thread that forked has 1 thread to compute with (those of GNU OpenMP "
        f"stay in the parent); call from another thread of this process to use all {_others}"
    )


def _wait() -> None:
    """Let no other thread be inside numba's compiler, or be starting its threads, when this one forks.

    However long that takes, which is seconds for a large kernel: LLVM's state of half a kernel is of no use in a child.
    """
    compiler, threads = (sys.modules.get(f"numba.{name}") for name in ("core.compiler_lock", "np.ufunc.parallel"))
    for module, name in ((compiler, "global_compiler_lock"), (threads, "_backend_init_thread_lock")):
        if hasattr(module, name):
            getattr(module, name).acquire()
            _held.append(getattr(module, name))
    if _TASKS.exists():
        _let_threads_end()


def _let_threads_end() -> None:
    """Wait until each other thread sleeps or has computed for longer than ending takes; twice, as one wakes another."""
    began, still, until = _running(), 0, time.monotonic() + _PATIENCE
    while still < 2 and time.monotonic() < until:
        time.sleep(0.001)
        now = _running()
        still = 0 if any(ran - began.setdefault(thread, ran) < _ENDING for thread, ran in now.items()) else still + 1


def _running() -> dict[str, float]:
    """The other threads that do not sleep, with the seconds each has run so far."""
    found = {}
    for task in _TASKS.iterdir():
        with suppress(OSError):  # it has ended meanwhile
            state, *fields = (task / "stat").read_text().rpartition(")")[2].split()
            if state in "RD" and task.name != str(threading.get_native_id()):
                found[task.name] = (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")
    return found


def _go_on() -> None:
    while _held:
        _held.pop().release()


def _begin() -> None:
    global _others
    _go_on()
    for one in list(_locks):
        if not one._is_owned():
            one._at_fork_reinit()
    _undo_blocks()
    if sys.platform != "linux":
        return  # OpenMP of LLVM or Intel, which starts anew in a child
    threads, alone = torch.get_num_threads(), _openmp_is_gnu()
    _renew_numba(alone)  # which sets torch's number as well
    if alone and threads > 1:
        _others = threads
    set_threads(1 if alone else threads)


def _undo_blocks() -> None:
    """Of the threads that stay in the parent; in which order they entered does not matter but within one."""
    me = threading.get_ident()
    for entry, (thread, undo) in reversed(list(_blocks.items())):
        if thread != me:
            del _blocks[entry]
            with suppress(Exception):  # of CUDA, which no child can use
                undo()


def _openmp_is_gnu() -> bool:
    return not hasattr(ctypes.CDLL(None), "kmp_get_blocktime")  # which LLVM's and Intel's have


def _renew_numba(alone: bool) -> None:
    """numba's OpenMP layer remembers the process that started it, and ends its children at their first kernel."""
    numba = sys.modules.get("numba")
    try:
        layer = numba.threading_layer()
    except (AttributeError, ValueError):  # not imported, or not started
        return
    if layer != "omp":
        return  # TBB and numba's own threads start anew
    from numba.np.ufunc import omppool

    ctypes.CFUNCTYPE(None, ctypes.c_int)(omppool.launch_threads)(numba.config.NUMBA_NUM_THREADS)
    if alone:
        numba.set_num_threads(1)  # for kernels of others; this package's say how many they need
