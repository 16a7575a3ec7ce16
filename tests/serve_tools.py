"""A server of its own in this process, and clients of it.

Fixtures are taken by name: ``speaker, client = serve_tools.speaker, serve_tools.client``, of a file's own ``running``.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from cases import require

try:
    import fastapi  # noqa: F401
    import httpx
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    pytest.skip(f"the extra serve, or httpx, is not installed: {error}", allow_module_level=True)

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.server.app import SpeechServer
from chatterbox_turbo.server.limits import Limits
from chatterbox_turbo.server.running import Server, listen

TEXT = "The quick brown fox jumps over the lazy dog."
LONG = f"{TEXT} " * 60  # some forty pieces, which take seconds
SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"
QUIET = {"decoding": {"progress": "off", "kernel": "torch", "streams": 8}}


@pytest.fixture(scope="module")
def speaker():
    """A model that stops after 40 tokens: more than one window."""
    require("turbo")
    model = synthetic.build("turbo", "tiny", stop_after=40)
    yield turbo.apply(model, QUIET)
    turbo.revert(model)


@pytest.fixture
def client(running):
    """A client of the server ``running``, which is idle again afterwards."""
    with running.client() as one:
        yield one
    running.settle()


@dataclass
class Running:
    """A server that runs, and what is in it."""

    url: str
    port: int
    served: SpeechServer
    server: Server
    thread: threading.Thread

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=200, trust_env=False, **options)

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until nothing is in flight; an error where that does not come."""
        wait(lambda: self.served.worker.idle, seconds)


def wait(done: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.01)


@contextmanager
def serving(
    model: Any, folder: Path | None = None, key: str | None = None, buffer: int = 0, **limits: Any
) -> Iterator[Running]:
    """``buffer``: bytes that the system keeps of what was sent and not read, where it is to be few."""
    served = SpeechServer(model, folder, Limits(**limits), key)
    listening = listen("127.0.0.1", 0)
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    server = Server(served)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    try:
        wait(lambda: server.started)
        port = listening.getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", port, served, server, thread)
    finally:
        server.stop()
        thread.join(100)
        assert not thread.is_alive() and not served.worker.alive


def asked(text: str = TEXT, **more: Any) -> dict[str, Any]:
    return {"input": text, "response_format": "pcm", "seed": 3, **more}


def samples(content: bytes, count: int) -> np.ndarray:
    """Of an audio file; ``count``: for a FLAC stream, which soundfile cannot read to an end that its header lacks."""
    if content[:4] == b"fLaC" and not (content[21] & 15 or any(content[22:26])):
        content = (
            content[:21] + bytes([content[21] | count >> 32]) + (count & 2**32 - 1).to_bytes(4, "big") + content[26:]
        )
    found = []
    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        while len(block := sound.read(4096, dtype="int16")):
            found.append(block)
    return np.concatenate(found)


def pcm(content: bytes) -> np.ndarray:
    return np.frombuffer(content, "<i2").astype(np.int32)
