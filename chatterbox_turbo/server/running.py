"""A server as a process: its socket, its end, and clients that stop reading."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import TurboError
from .app import SpeechServer

logger = logging.getLogger(__name__)

BACKLOG = 128
CONNECTIONS = 512  # at once; more are answered 503


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free. Taken before a model is loaded, which may be long.

    Raises:
        TurboError: the port is in use, or the address is none of this machine's.
    """
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        if listening is not None:
            listening.close()
        if error.errno == errno.EADDRINUSE:
            raise TurboError(
                f"Port {port} of {host} is in use.", "Another process listens there.", "Choose another one with --port."
            ) from None
        raise TurboError(f"Cannot listen on port {port} of {host}: {error.strerror or error}.") from None
    return listening


class Server(uvicorn.Server):
    """uvicorn that lets what is in flight finish (``limits.draining``) while new requests are refused."""

    def __init__(self, served: SpeechServer, verbose: bool = False):
        self._served = served
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: asyncio.Event | None = None
        super().__init__(
            uvicorn.Config(
                served.app,
                http=_protocol(served.limits.receiving, served.limits.sending),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=verbose,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it gracefully, the second at once."""
        if self._served.status.draining or not self.started:
            self.force_exit = self.should_exit = True
        self.stop()

    def stop(self) -> None:
        """End it gracefully; from any thread."""
        if self._loop is not None and self._told is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._told.set)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until it is told to end."""
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Event()
        draining = asyncio.create_task(self._drain(self._told))
        try:
            await super().serve(sockets)
        finally:
            draining.cancel()

    async def _drain(self, told: asyncio.Event) -> None:
        await told.wait()
        self._served.status.draining = True
        worker, until = self._served.worker, time.monotonic() + self._served.limits.draining
        while not worker.idle and time.monotonic() < until and not self.should_exit:
            await asyncio.sleep(0.02)
        if not worker.idle:
            logger.warning("%d requests did not finish in time and are cut off.", worker.in_flight + worker.waiting)
            await asyncio.to_thread(worker.close)
        # what was made is still on its way to the clients
        self.config.timeout_graceful_shutdown = max(1, int(until - time.monotonic()))
        self.should_exit = True


def _protocol(receiving: float, sending: float) -> type[H11Protocol]:
    """HTTP/1.1 that drops connections whose client does not send its request, or does not read, for so many seconds.

    What was sent stays in the system's buffer of the socket and no other: the next block waits until it is gone.
    """

    class Impatient(H11Protocol):
        _heading: asyncio.TimerHandle | None = None
        _looking: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_head()

        def _await_head(self) -> None:
            # for a head; or for the rest of a body that has been answered already, which nobody reads any more
            theirs, ours = self.conn.their_state, self.conn.our_state
            waits = theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)
            waits = waits and not self.transport.is_closing()
            if waits and self._heading is None:
                self._heading = self.loop.call_later(receiving, self.transport.abort)
            if not waits and self._heading is not None:
                self._heading.cancel()
                self._heading = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._look(None)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._look_away()

        def connection_lost(self, exc: Exception | None) -> None:
            self._look_away()
            if self._heading is not None:
                self._heading.cancel()
            super().connection_lost(exc)

        def _look(self, before: int | None) -> None:
            left = self.transport.get_write_buffer_size()
            if before is not None and left >= before:
                logger.warning("A client has stopped reading; its connection is dropped.")
                self.transport.abort()
                return
            self._looking = self.loop.call_later(sending, self._look, left)

        def _look_away(self) -> None:
            if self._looking is not None:
                self._looking.cancel()
                self._looking = None

    return Impatient
