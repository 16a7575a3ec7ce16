"""Malformed requests for ``serve``: what Hypothesis makes, and what must be true whatever it is.

python tests/serve_fuzz.py [COUNT]   so many requests (10,000) to a server in this process, and figures of what is left
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from serve_tools import SPEECH, VOICES, Running, httpx, serving, wait

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from hypothesis.configuration import set_hypothesis_home_dir
except ImportError:
    pytest.skip("hypothesis is not installed", allow_module_level=True)

FORBIDDEN = ("/etc/passwd", "/dev/zero", "secret.wav")  # nothing of that name is opened
NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "file:///etc/passwd",
    "secret.wav",
    "..\\secret",
    "con",
    "a\0b",
]
FIELDS = (
    *("input", "model", "voice", "response_format", "speed", "instructions", "stream", "stream_format", "seed"),
    *("language", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "exaggeration", "cfg_weight"),
    *("audio_prompt_path", "voice_folder"),
)
FORMATS = ["mp3", "opus", "flac", "wav", "pcm"]
RECORDING = base64.b64decode("UklGRiQAAABXQVZFZm10IBAAAAABAAEAwF0AAIC7AAACABAAZGF0YQAAAAA=")  # a WAV file's header

text = st.one_of(st.text(max_size=60), st.sampled_from(NAMES), st.text("\ud800\udfff\0\u202e aA1.", max_size=20))
scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(), text, st.sampled_from(FORMATS)
)
value = st.recursive(scalar, lambda of: st.lists(of, max_size=3) | st.dictionaries(text, of, max_size=3), max_leaves=6)
paths = st.one_of(
    st.sampled_from(
        [SPEECH, VOICES, "/v1/models", "/metrics", "/health", "/", "/page.js", "/openapi.json", "//", "/../etc"]
    ),
    st.sampled_from(NAMES).map(lambda name: f"{VOICES}/{quote(name, safe='')}"),
    text.map(lambda name: f"{VOICES}/{quote(name.encode('utf-8', 'replace'))}"),
    text.map(lambda name: "/" + quote(name.encode("utf-8", "replace"), safe="")),
)
header_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40).map(str.strip)
headers = st.dictionaries(
    st.sampled_from(["authorization", "range", "accept", "origin", "sec-fetch-site", "expect", "cookie", "te", "x-a"]),
    header_text,
    max_size=3,
)


@st.composite
def spoken(draw: Any) -> tuple[str, str, dict[str, str], bytes]:
    """JSON for the speech endpoint, right but for some fields."""
    body: dict[str, Any] = {"input": "Hello.", "seed": 1, "response_format": "pcm"}
    for _ in range(draw(st.integers(1, 3))):
        body[draw(st.sampled_from(FIELDS) | text)] = draw(value)
    content = json.dumps(body, ensure_ascii=True).encode()
    if draw(st.integers(0, 5)) == 0:
        cut = draw(st.integers(0, len(content)))
        content = content[:cut] + draw(st.binary(max_size=8)) + content[cut + 1 :]
    return "POST", SPEECH, {"content-type": "application/json"}, content


@st.composite
def uploaded(draw: Any) -> tuple[str, str, dict[str, str], bytes]:
    """A form for the voices, with something wrong in it."""
    content = bytearray(draw(st.sampled_from([RECORDING, b"fLaC", b"OggS", b"ID3", b"PK\3\4", b""])))
    for _ in range(draw(st.integers(0, 4))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    content += draw(st.binary(max_size=200))
    parts = b""
    for name, of in (("name", draw(text).encode("utf-8", "replace")), ("audio_sample", bytes(content))):
        if draw(st.integers(0, 7)):
            file = (
                f'; filename="{draw(st.sampled_from(["a.wav", "../secret.wav", "/etc/passwd"]))}"'
                if "_" in name
                else ""
            )
            parts += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + of + b"\r\n"
    end = draw(st.sampled_from([b"--b--\r\n", b"--b", b"", b"--b\r\n"]))
    kind = draw(st.sampled_from(["multipart/form-data; boundary=b"] * 6 + ["multipart/form-data", "text/plain"]))
    return "POST", VOICES, {"content-type": kind}, parts + end


anything = st.tuples(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    paths,
    headers,
    st.binary(max_size=100),
)
raw = st.one_of(
    st.binary(min_size=1, max_size=200),
    st.binary(max_size=100).map(lambda rest: b"POST /v1/audio/speech HTTP/1.1\r\n" + rest + b"\r\n\r\n"),
    st.binary(max_size=100).map(
        lambda rest: b"POST /v1/audio/voices HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + rest
    ),
)
requests = st.one_of(spoken(), spoken(), uploaded(), anything, raw)


def send(running: Running, client: httpx.Client, request: Any) -> str:
    """The status of the answer, or what came instead.

    Raises:
        AssertionError: the server says that it has failed.
    """
    if isinstance(request, bytes):
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as one:
            one.sendall(request)
            one.shutdown(socket.SHUT_WR)
            try:
                first = one.recv(12)
            except ConnectionError:
                first = b""
        status = first[9:12].decode("ascii", "replace") or "closed"
    else:
        method, path, more, content = request
        answer = client.request(method, path, headers=more, content=content)
        status = str(answer.status_code)
        assert answer.status_code < 400 or method == "HEAD" or answer.json()["error"]["message"], answer.text
    assert status not in ("500", "502", "504"), request
    return status


class Watch:
    """Files that this process opens, while ``on``."""

    def __init__(self) -> None:
        self.on, self.written, self.read = False, set(), set()
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(arguments[2], int) else 0
            (self.written if writes else self.read).add(os.fsdecode(arguments[0]))


def fuzz(running: Running, folder: Path, count: int, watch: Watch, random: bool = False) -> Counter[str]:
    """Statuses of so many requests; an error where one is answered with 500 or a file is opened that must not be."""
    found: Counter[str] = Counter()
    own = folder.parent / "hypothesis"  # what it notes of Unicode and of this program's constants
    set_hypothesis_home_dir(own)
    with running.client() as client:

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=not random,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(requests)
        def one(request: Any) -> None:
            found[send(running, client, request)] += 1

        watch.on = True
        try:
            one()
        finally:
            watch.on = False
        running.settle(100)
    allowed = (str(folder), str(own), os.devnull)
    outside = {path for path in watch.written if not path.startswith(allowed)}
    assert not outside, outside
    assert not {path for path in watch.read | watch.written if any(word in path for word in FORBIDDEN)}
    kept = {f"{one['id']}.safetensors" for one in running.served.voices.listed()} - {"default.safetensors"}
    assert {path.name for path in folder.iterdir()} == kept
    return found


def main(count: int = 10_000) -> None:
    """Print what came of it, in portions, with what the process holds after each."""
    import chatterbox_turbo as turbo

    model = turbo.apply(
        turbo.synthetic.build("turbo", "tiny", stop_after=12), {"decoding": {"progress": "off", "streams": 8}}
    )
    process, watch = psutil.Process(), Watch()
    with (
        tempfile.TemporaryDirectory() as top,
        serving(model, Path(top) / "voices" if _made(top) else None, text=200, voices=5) as running,
    ):
        total: Counter[str] = Counter()
        start, portion = time.monotonic(), max(1, count // 10)
        for number in range(0, count, portion):
            total += fuzz(running, Path(top) / "voices", min(portion, count - number), watch, random=True)
            wait(lambda: len(running.server.server_state.connections) == 0)
            print(
                f"{total.total():6} requests, {time.monotonic() - start:5.0f} s, "
                f"{process.memory_info().rss / 2**20:5.0f} MiB, {process.num_fds()} files, "
                f"{threading.active_count()} threads, "
                f"{len(model.turbo.token_model.service)} in the batch",
                flush=True,
            )
    print(", ".join(f"{status}: {times}" for status, times in sorted(total.items())))


def _made(top: str) -> bool:
    (Path(top) / "voices").mkdir()
    return True


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
