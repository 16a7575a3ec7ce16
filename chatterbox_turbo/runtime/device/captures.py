"""When a graph may be captured: not while another thread computes on CUDA, and nobody begins to while one is captured.

During a capture torch's default generator refuses random numbers in every thread, its allocator refuses to empty its
cache, and a device cannot be waited for. So a capture waits for the calls that are under way, and calls that begin
wait for it. A call that waits to capture draws nothing, and does not hold others up.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PATIENCE = 30.0  # seconds; then something waits for us that we would wait for


class _Gate:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._depths: Counter[int] = Counter()  # calls under way, by thread
        self._waiting: set[int] = set()  # threads that capture, or are about to
        self._capturing: int | None = None

    def active(self) -> int:
        """Threads with a call under way."""
        return len(self._depths)

    @contextmanager
    def computing(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            if me not in self._depths and me != self._capturing:
                self._changed.wait_for(lambda: not self._waiting, PATIENCE)
            self._depths[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._depths[me] -= 1
                if not self._depths[me]:
                    del self._depths[me]
                self._changed.notify_all()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        me = threading.get_ident()
        if me == self._capturing:
            yield
            return
        with self._changed:
            self._waiting.add(me)
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._capturing is None and not self._busy(me), PATIENCE)
                self._changed.wait_for(lambda: self._capturing is None)  # torch knows of one capture only
            except BaseException:
                self._leave(me)
                raise
            self._capturing = me
        try:
            yield
        finally:
            with self._changed:
                self._capturing = None
                self._leave(me)

    def underway(self) -> bool:
        """Whether a graph is being captured now; not while the calling thread is ``computing``, but for patience."""
        return self._capturing is not None

    def _busy(self, me: int) -> set[int]:
        return set(self._depths) - self._waiting - {me}

    def _leave(self, me: int) -> None:
        self._waiting.discard(me)
        self._changed.notify_all()


_gate = _Gate()
capturing = _gate.capturing  # surrounds a capture
underway = _gate.underway
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_gate.__init__)  # of the threads that were in it, none is in the child


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Surrounds whatever computes on a device; only on CUDA does it do anything. May be nested in a thread."""
    if device.type != "cuda":
        yield
        return
    with _gate.computing():
        yield
