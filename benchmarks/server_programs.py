"""The servers that benchmarks/servers.py runs: how each is told where to listen, and what it can be asked for."""

from __future__ import annotations

import base64
import functools
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import soundfile

SHORT = "Harbour note number {0}: the ferry leaves at nine, with or without the mail."
LONG = (
    "The lamp in the tower has been lit every evening since the winter of the great storm. Nobody in the village "
    "remembers who lit it first. On clear nights it can be seen from the far shore, they say, and on foggy ones it "
    "is the horn that brings the boats home. {0} of them came back last night."
)


class NoSpeech(Exception):
    """An answer that is no speech: another status than 200, nothing in it, or silence."""


@dataclass(frozen=True)
class Case:
    """A kind of request: ``arguments(number, seed)`` are those of ``httpx.Client.post``."""

    name: str
    path: str
    arguments: Callable[[int], dict[str, Any]]
    job: bool = False  # answered by a job's number, to be asked for until it is done


@dataclass
class Program:
    """A server.

    Attributes:
        name, script, family, repository: of the program, and of the model that it loads from the hub by default.
        configure: of (copy of the checkout, port, recording); writes what the program reads, returns its variables.
        ready: whether what ``health`` answers tells of a loaded model.
        cases: the first is the one that is asked in a row and by several clients.
        seeded: a request carries its seed; otherwise the process is seeded before each.
        unload, reload: paths, where there are such.
    """

    name: str
    script: str
    family: str
    repository: str
    configure: Callable[[Path, int, Path], dict[str, str]]
    health: str
    ready: Callable[[dict[str, Any]], bool]
    cases: list[Case]
    seeded: bool = False
    unload: str | None = None
    reload: str | None = None
    before: list[Case] = field(default_factory=list)


def ask(client: httpx.Client, case: Case, number: int) -> tuple[bytes, float, float]:
    """Samples of one answer, seconds until its first byte of the body, and until its last.

    Raises:
        NoSpeech, httpx.HTTPError.
    """
    start, first, parts = time.perf_counter(), 0.0, []
    with client.stream("POST", case.path, **case.arguments(number)) as answer:
        for part in answer.iter_bytes():
            first = first or time.perf_counter() - start
            parts.append(part)
    body, kind = b"".join(parts), answer.headers.get("content-type", "")
    if answer.status_code == 200 and case.job:
        body, kind = _job(client, case.path, json.loads(body)["job_id"])
    elif answer.status_code != 200:
        raise NoSpeech(f"{answer.status_code}: {body[:200].decode(errors='replace')}")
    seconds = time.perf_counter() - start
    samples = _samples(body, kind)
    if not any(samples):
        raise NoSpeech(f"{len(samples)} bytes of silence")
    return samples, first, seconds


def _job(client: httpx.Client, path: str, number: str) -> tuple[bytes, str]:
    while True:
        state = client.get(f"{path}/{number}").json()
        if "status" not in state:
            raise NoSpeech(f"no status of a job: {json.dumps(state)[:200]}")
        if state["status"] in ("failed", "cancelled"):
            raise NoSpeech(f"job {state['status']}: {json.dumps(state.get('metadata'))[:200]}")
        if state["status"] == "completed":
            break
        time.sleep(0.2)
    answer = client.get(f"{path}/{number}/download")
    if answer.status_code != 200:
        raise NoSpeech(f"{answer.status_code}: {answer.text[:200]}")
    return answer.content, answer.headers.get("content-type", "")


def _samples(body: bytes, kind: str) -> bytes:
    """What is compared: the samples, without what names an encoder or a stream (Ogg has a number drawn by chance)."""
    if "event-stream" in kind:
        events = [json.loads(line[5:]) for line in body.splitlines() if line.startswith(b"data:")]
        return b"".join(base64.b64decode(event["audio"]) for event in events if "audio" in event)
    if body[:4] == b"RIFF":  # a stream's header has no length that soundfile would believe
        return body[body.index(b"data") + 8 :]
    return soundfile.read(io.BytesIO(body), dtype="float32")[0].tobytes()


def _tts_server() -> Program:
    def configure(folder: Path, port: int, recording: Path) -> dict[str, str]:
        samples, rate = soundfile.read(recording, dtype="int16")
        soundfile.write(folder / "voices" / "recorded.wav", samples, rate)
        settings = {
            "server": {"host": "127.0.0.1", "port": port},
            "model": {"repo_id": "chatterbox-turbo"},
            "tts_engine": {"device": "cpu"},
        }
        (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
        return {"BROWSER": "true"}  # it opens one

    def tts(text: str = SHORT, **options: Any) -> Callable[[int], dict[str, Any]]:
        voice = {"voice_mode": "predefined", "predefined_voice_id": "recorded.wav"}
        return lambda number: {"json": {"text": text.format(number), "seed": 1 + number, **voice, **options}}

    def openai(text: str = SHORT, kind: str = "wav", **options: Any) -> Callable[[int], dict[str, Any]]:
        options = {"model": "tts-1", "voice": "recorded.wav", "response_format": kind, **options}
        return lambda number: {"json": {"input": text.format(number), "seed": 1 + number, **options}}

    clone = {"voice_mode": "clone", "reference_audio_filename": "uploaded.wav"}
    return Program(
        "Chatterbox-TTS-Server",
        "server.py",
        "turbo",
        "ResembleAI/chatterbox-turbo",
        configure,
        "/api/model-info",
        lambda state: bool(state["loaded"]),
        [
            Case("/tts", "/tts", tts()),
            Case("/tts, uploaded voice", "/tts", tts(**clone)),
            Case("/tts, text in pieces", "/tts", tts(LONG, chunk_size=80)),
            Case("/tts, speed 1.3", "/tts", tts(speed_factor=1.3)),
            Case("/tts, Opus", "/tts", tts(output_format="opus")),
            Case("/tts, MP3", "/tts", tts(output_format="mp3")),
            Case("/v1/audio/speech", "/v1/audio/speech", openai()),
            Case("/v1/audio/speech, text in pieces", "/v1/audio/speech", openai(LONG)),
            Case("/v1/audio/speech, Opus", "/v1/audio/speech", openai(kind="opus")),
        ],
        seeded=True,
        unload="/api/unload",
        reload="/restart_server",
        before=[Case("upload", "/upload_reference", lambda _: {"files": _file("files")})],
    )


def _tts_api() -> Program:
    def configure(folder: Path, port: int, recording: Path) -> dict[str, str]:
        return {"HOST": "127.0.0.1", "PORT": str(port), "DEVICE": "cpu", "VOICE_SAMPLE_PATH": str(recording)}

    def speech(text: str = SHORT, **options: Any) -> Callable[[int], dict[str, Any]]:
        return lambda number: {"json": {"input": text.format(number), **options}}

    def form(text: str = SHORT, **options: str) -> Callable[[int], dict[str, Any]]:
        return lambda number: {"data": {"input": text.format(number), **options}, "files": _file("voice_file")}

    pieces = {"streaming_chunk_size": 80, "streaming_strategy": "sentence"}
    # above 3,000 characters, and not the same words again and again, which it refuses
    entry = "In {0} boat B{0} brought {1} crates to pier P{0}, {{0}} of them wet.".format
    very_long = " ".join(entry(1700 + n, 5 + 37 * n) for n in range(60))
    return Program(
        "chatterbox-tts-api",
        "main.py",
        "multilingual",
        "ResembleAI/chatterbox",
        configure,
        "/health",
        lambda state: bool(state["model_loaded"]),
        [
            Case("/audio/speech", "/audio/speech", speech()),
            Case("/audio/speech, text in pieces", "/audio/speech", speech(f"{LONG} {LONG}")),
            Case("/audio/speech, events", "/audio/speech", speech(LONG, stream_format="sse", **pieces)),
            Case("/audio/speech/upload", "/audio/speech/upload", form()),
            Case("/audio/speech/upload, events", "/audio/speech/upload", form(stream_format="sse")),
            Case("/audio/speech/stream", "/audio/speech/stream", speech(LONG, **pieces)),
            Case("/audio/speech/stream/upload", "/audio/speech/stream/upload", form()),
            Case("/v1/audio/speech", "/v1/audio/speech", speech()),
            Case("/audio/speech/long", "/audio/speech/long", speech(very_long, response_format="wav"), job=True),
        ],
    )


@functools.cache
def _file(name: str) -> dict[str, tuple[str, bytes, str]]:
    from chatterbox_turbo import synthetic

    written = io.BytesIO()
    samples, rate = soundfile.read(synthetic.reference_voice(), dtype="int16")
    soundfile.write(written, samples, rate, format="WAV")
    return {name: ("uploaded.wav", written.getvalue(), "audio/wav")}


def program_in(folder: Path) -> Program:
    """Which server a checkout is of; ``SystemExit`` where it is neither."""
    if (folder / "engine.py").is_file() and (folder / "server.py").is_file():
        return _tts_server()
    if (folder / "app" / "core" / "tts_model.py").is_file() and (folder / "main.py").is_file():
        return _tts_api()
    raise SystemExit(f"{folder} is no checkout of Chatterbox-TTS-Server or chatterbox-tts-api. Name the folder of one.")
