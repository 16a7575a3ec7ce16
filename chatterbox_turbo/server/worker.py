"""The one thread that speaks: streams of requests in flight, advanced in turn, so that they share T3's batch.

A request is a stream of the model (``model.turbo.stream``), whole answers too, which are streams of one window. The
thread advances one of them for a few tokens or by one window, and goes on with another: whose first block is waited
for is first, then whoever has waited longest. Tokens come for all of them at once (``runtime.t3.service``), so that it
does not matter whose turn it is. Whoever has enough unread blocks is passed over until they are taken.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..runtime.s3gen.streaming import Windows
from ..speech.stream import SpeechStream, StreamMetrics

logger = logging.getLogger(__name__)

Block = tuple[Tensor, StreamMetrics]
WHOLE = Windows(first_chunk=4096, chunk=4096, longest_chunk=4096)  # one window: nothing is solved twice
TOKENS = 4  # of the batch between two looks at who else is there
UNREAD = 4  # blocks of a stream
CALLS = 4  # other work that waits
GUESS = 5.0  # seconds of a request, before there has been one


class BusyError(Exception):
    """There is no room for a request; ``after``: seconds from now that there may be."""

    def __init__(self, what: str, after: int):
        super().__init__(what)
        self.after = after


class Job:
    """One request, from the queue to its last block; made by ``SpeechWorker.submit``."""

    def __init__(self, worker: SpeechWorker, given: Mapping[str, Any], live: bool):
        self._worker, self._given, self.live = worker, given, live
        self._loop = asyncio.get_running_loop()
        self._blocks: asyncio.Queue[Block | Exception | None] = asyncio.Queue()
        self.stream: SpeechStream | None = None
        self.arrived, self.begun = time.perf_counter(), 0.0
        self.unread = self.sent = 0  # under the worker's lock
        self.over = self.cancelled = False

    def open(self, model: Any) -> None:
        """Take a place; in the worker's thread."""
        self.begun = time.perf_counter()
        self.stream = model.turbo.stream(windows=None if self.live else WHOLE, **self._given)

    def put(self, item: Block | Exception | None) -> None:
        """Hand something to who waits for it; ``None``: that was all."""
        with suppress(RuntimeError):  # its event loop is gone, and whoever waited there
            self._loop.call_soon_threadsafe(self._blocks.put_nowait, item)

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self._worker.cancel(self)

    async def blocks(self) -> AsyncIterator[Block]:
        """(samples (1, m), metrics) as they come.

        Raises:
            Exception: what the model has failed with.
        """
        while (item := await self._blocks.get()) is not None:
            if isinstance(item, Exception):
                raise item
            self._worker.taken(self)
            yield item


class SpeechWorker:
    """Speaks with one optimized model, for an event loop's requests.

    Args:
        slots, queue: as ``Limits``.
    """

    def __init__(self, model: Any, slots: int, queue: int):
        self._model, self._slots, self._queue = model, slots, queue
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._flight: deque[Job] = deque()  # whose turn it is first
        self._calls: deque[Callable[[], None]] = deque()
        self._seconds = GUESS  # of a request in flight, a moving average
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="speech", daemon=True)
        self._thread.start()

    # -- for the event loop

    def submit(self, given: Mapping[str, Any], live: bool) -> Job:
        """A request more.

        Args:
            given: arguments of ``model.turbo.stream``.
            live: block by block; otherwise in one.

        Raises:
            BusyError: the queue is full.
        """
        job = Job(self, given, live)
        with self._changed:
            if len(self._flight) + len(self._waiting) >= self._slots + self._queue:
                raise BusyError(
                    f"{len(self._flight)} requests are in flight and {len(self._waiting)} wait", self._after()
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that runs in the thread, between two steps of those in flight.

        Raises:
            BusyError: too many wait already.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()

        def settle(how: Callable[[Any], None], value: Any) -> None:
            if not result.done():
                how(value)

        def run() -> None:
            try:
                outcome: tuple[Callable[[Any], None], Any] = result.set_result, function()
            except Exception as error:
                outcome = result.set_exception, error
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, *outcome)

        with self._changed:
            if len(self._calls) >= CALLS:
                raise BusyError("Too many recordings are being encoded", self._after())
            self._calls.append(run)
            self._changed.notify()
        return await result

    def taken(self, job: Job) -> None:
        """A block was read."""
        with self._changed:
            job.unread -= 1
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the rest of a request."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.over = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Requests with a place in the batch."""
        return len(self._flight)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._changed:
            return not (self._waiting or self._flight or self._calls)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, seconds: float = 10.0) -> None:
        """End the thread after its step; what is in flight or waits is told."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(seconds)

    def _after(self) -> int:
        return max(1, math.ceil(self._seconds * (1 + len(self._waiting)) / self._slots))

    # -- the thread

    def _run(self) -> None:
        while (step := self._next()) is not None:
            step()
        for job in (*self._flight, *self._waiting):
            self._end(job, ConnectionAbortedError("the server ends"))

    def _next(self) -> Callable[[], None] | None:
        """What is to be done now; waits until there is something."""
        with self._changed:
            while not self._ending:
                if self._calls:
                    return self._calls.popleft()
                for job in self._flight:
                    if job.cancelled:
                        return lambda job=job: self._end(job)
                if self._waiting and len(self._flight) < self._slots:
                    job = self._waiting.popleft()
                    self._flight.append(job)
                    return lambda: self._begin(job)
                ready = [job for job in self._flight if not job.live or job.unread < UNREAD]
                if ready:
                    job = next((one for one in ready if one.live and not one.sent), ready[0])
                    self._flight.remove(job)
                    self._flight.append(job)
                    return lambda: self._advance(job)
                self._changed.wait()
        return None

    def _begin(self, job: Job) -> None:
        try:
            job.open(self._model)
        except Exception as error:
            self._end(job, error)

    def _advance(self, job: Job) -> None:
        try:
            block = job.stream.poll(TOKENS)
        except StopIteration:
            self._seconds += 0.2 * (time.perf_counter() - job.begun - self._seconds)
            self._end(job)
        except Exception as error:
            self._end(job, error)
        else:
            if block is not None:
                with self._changed:
                    job.unread += 1
                    job.sent += 1
                job.put(block)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        if job.stream is not None:
            try:
                job.stream.close()
            except Exception:
                logger.exception("A stream could not be closed.")
        with self._changed:
            for line in (self._flight, self._waiting):
                if job in line:
                    line.remove(job)
            job.over = True
        job.put(error)
