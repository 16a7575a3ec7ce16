"""``serve`` where something goes wrong: clients, uploads, disks, the model, the end of the process."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import threading
import time
import wave
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import serve_tools
import soundfile
import torch
from cases import require
from cli_tools import error, started
from serve_tools import LONG, SPEECH, TEXT, VOICES, asked, pcm, serving, wait

from chatterbox_turbo import TurboError
from chatterbox_turbo.runtime.t3.service import Service
from chatterbox_turbo.server.running import listen

speaker, client = serve_tools.speaker, serve_tools.client


@pytest.fixture(scope="module")
def running(speaker, tmp_path_factory):
    with serving(speaker, tmp_path_factory.mktemp("voices"), upload=400_000, recording=12.0) as started:
        yield started


def silence(seconds: float, container: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(seconds * 24_000), np.int16), 24_000, format=container, subtype="PCM_16")
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(20_000_000))
    return file.getvalue()


def lying() -> bytes:
    """A WAV file whose header promises two gigabytes."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(24_000)
        sound.writeframes(bytes(4_800))
    content = bytearray(file.getvalue())
    content[40:44] = (2**31).to_bytes(4, "little")
    return bytes(content)


UPLOADS = {
    "text": (lambda: b"This is no recording.", 400, "not audio"),
    "nothing": (lambda: b"", 400, "not audio"),
    "a zip bomb": (zipped, 400, "not audio"),
    "an hour of silence in 40 kB": (lambda: silence(3600), 413, "longer than 12 s"),
    "a header that promises more": (lying, 400, ""),
    "half a file": (lambda: silence(9)[:60], 400, ""),
    "too short": (lambda: silence(1), 400, ""),
    "no sound": (lambda: silence(8), 400, "silent"),
    "too many bytes": (lambda: silence(11, "WAV"), 413, "bytes"),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_an_upload_that_is_no_voice_is_told_and_nothing_is_kept(client, running, case):
    make, status, words = UPLOADS[case]
    answer = client.post(VOICES, data={"name": "anna"}, files={"audio_sample": ("a", make())})
    assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text
    assert [one["id"] for one in client.get(VOICES).json()["voices"]] == ["default"]
    assert not [*running.served.voices._folder.iterdir()]


def test_a_gigabyte_is_refused_before_it_is_read(client):
    sent = []

    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="audio_sample"; filename="a"\r\n\r\n'
        for _ in range(1000):
            sent.append(1)
            yield bytes(1_000_000)

    boundary = {"content-type": "multipart/form-data; boundary=b"}
    for headers in ({**boundary, "content-length": "1000000000"}, boundary):
        sent.clear()
        answer = client.post(VOICES, content=endless(), headers=headers)
        assert answer.status_code == 413 and len(sent) < 100


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "application/json", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=b", 400),
        (b"--b\r\n\r\n", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
    ],
)
def test_a_form_that_is_none_is_told(client, content, kind, status):
    answer = client.post(VOICES, content=content, headers={"content-type": kind})
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_fifth_upload_at_once_is_refused(client, running):
    kind = "Content-Type: multipart/form-data; boundary=b"
    head = f"POST {VOICES} HTTP/1.1\r\nHost: a\r\n{kind}\r\nContent-Length: 9\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", running.port), timeout=60) for _ in range(4)]
    try:
        for one in slow:
            one.sendall(head.encode())
        wait(lambda: running.served._uploads == 4)
        refused = client.post(VOICES, data={"name": "anna"}, files={"audio_sample": ("a", b"x")})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "5"
    finally:
        for one in slow:
            one.close()
    wait(lambda: running.served._uploads == 0)


def test_a_full_disk_leaves_no_voice_behind(client, running, voice, monkeypatch):
    recording, before = Path(voice).read_bytes(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    answer = client.post(VOICES, data={"name": "anna"}, files={"audio_sample": ("a", recording)})
    assert answer.status_code == 507 and "No space left" in answer.json()["error"]["message"]
    assert str(running.served.voices._folder) not in answer.text
    assert len(client.get(VOICES).json()["voices"]) == 1 and not [*running.served.voices._folder.iterdir()]
    monkeypatch.setattr(os, "fsync", before)
    assert client.post(VOICES, data={"name": "anna"}, files={"audio_sample": ("a", recording)}).status_code == 201
    assert client.delete(f"{VOICES}/anna").status_code == 200


def test_a_request_that_does_not_come_is_not_waited_for(speaker):
    head = f"POST {SPEECH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{{"
    with serving(speaker, receiving=1.0) as running:
        for sent, answer in ((head, b"HTTP/1.1 408"), ("GET /health HT", b""), ("", b"")):
            with socket.create_connection(("127.0.0.1", running.port), timeout=60) as slow:
                slow.sendall(sent.encode())
                assert slow.recv(1000).startswith(answer)
                assert answer or not slow.recv(1000)


def test_a_body_that_nobody_reads_any_more_is_not_waited_for(speaker):
    head = "POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n"
    with (
        serving(speaker, receiving=1.0) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=60) as slow,
    ):
        slow.sendall(head.encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 404")
        slow.sendall(b"x")  # which ends uvicorn's own patience with a connection that is idle
        while slow.recv(1000):
            pass


def test_a_client_that_stops_reading_is_dropped_and_holds_nobody_up(speaker):
    with serving(speaker, sending=1.0, buffer=8_192) as running, running.client() as other, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        lazy.connect(("127.0.0.1", running.port))
        body = httpx.Request("POST", running.url, json=asked(LONG[:600], stream=True)).content
        lazy.sendall(
            f"POST {SPEECH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait(lambda: running.served.worker.in_flight)
        assert other.post(SPEECH, json=asked()).status_code == 200
        running.settle(100)
        wait(lambda: 'outcome="cancelled"} 1.0' in other.get("/metrics").text)


def test_a_slow_reader_is_waited_for(speaker):
    with serving(speaker, sending=0.5, buffer=8_192) as running, running.client() as client:
        expected = client.post(SPEECH, json=asked(stream=True)).content
        with client.stream("POST", SPEECH, json=asked(stream=True)) as answer:
            parts = []
            for part in answer.iter_raw(4_096):
                parts.append(part)
                time.sleep(0.05)
        assert b"".join(parts) == expected


def test_a_model_that_fails_in_the_middle_cuts_the_connection_and_goes_on(client, running, speaker, monkeypatch):
    expected = client.post(SPEECH, json=asked(stream=True)).content
    step, count = Service._step, []

    def failing(self):
        count.append(1)
        if len(count) == 300:
            raise RuntimeError("the device is gone")
        step(self)

    monkeypatch.setattr(Service, "_step", failing)
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        client.post(SPEECH, json=asked(LONG, stream=True))
    count.clear()
    lines: list[str] = []
    with (
        pytest.raises(httpx.RemoteProtocolError),
        client.stream("POST", SPEECH, json=asked(LONG, stream_format="sse")) as told,
    ):
        for line in told.iter_lines():
            lines.append(line)
    last = [line for line in lines if line][-1]
    assert '"error"' in last and "device" not in last
    count[:] = [1] * 299
    whole = client.post(SPEECH, json=asked())
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
    assert "device" not in whole.text, "what is inside is for the log"
    assert client.post(SPEECH, json=asked(stream=True)).content == expected
    assert client.get("/health/ready").status_code == 200


def test_weights_that_are_none_fail_alone_and_speech_comes_back(client, speaker):
    expected = client.post(SPEECH, json=asked()).content
    head = speaker.t3.speech_head.weight
    kept = head.detach().clone()
    with speaker.turbo.lock, torch.no_grad():
        head.fill_(float("nan"))
    assert client.post(SPEECH, json=asked()).status_code == 500
    with speaker.turbo.lock, torch.no_grad():
        head.copy_(kept)
    assert client.post(SPEECH, json=asked()).content == expected


def test_what_is_in_flight_finishes_when_the_server_is_told_to_end(speaker):
    with serving(speaker) as running, running.client() as client, running.client() as late:
        late.get("/health")
        with client.stream("POST", SPEECH, json=asked(LONG[:1200], stream=True)) as answer:
            blocks = answer.iter_raw()
            content = [next(blocks)]
            running.server.stop()
            wait(lambda: running.served.status.draining)
            refused = late.post(SPEECH, json=asked())
            assert refused.status_code == 503 and "retry-after" in refused.headers
            with running.client() as new:
                assert new.get("/health/live").status_code == 200 and new.get("/health/ready").status_code == 503
            content += blocks
        running.thread.join(100)
        assert not running.thread.is_alive()
    assert len(pcm(b"".join(content))) > 3 * 24_000


def test_what_does_not_finish_in_time_is_cut_off(speaker):
    with serving(speaker, draining=0.2) as running, running.client() as client:
        with (
            pytest.raises(httpx.RemoteProtocolError),
            client.stream("POST", SPEECH, json=asked(LONG, stream=True)) as answer,
        ):
            for _ in answer.iter_raw():
                running.server.stop()
        running.thread.join(100)
        assert not running.thread.is_alive()
    assert len(speaker.turbo.token_model.service) == 0


def test_a_port_in_use_is_told_before_a_model_is_loaded(capsys, monkeypatch, tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        code, message = error(capsys, "serve", "--synthetic", "--port", port)
        assert code == 1 and f"Port {port} of 127.0.0.1 is in use" in message and "--port" in message
    code, message = error(capsys, "serve", "--synthetic", "--api-key-env", "NO_SUCH_KEY")
    assert code == 2 and "NO_SUCH_KEY" in message
    monkeypatch.setenv("CHATTERBOX_TURBO_API_KEY", " ")
    assert "ASCII" in error(capsys, "serve", "--synthetic")[1]
    monkeypatch.delenv("CHATTERBOX_TURBO_API_KEY")
    assert "no such folder" in error(capsys, "serve", "--synthetic", "--voice-folder", str(tmp_path / "none"))[1]
    assert "converts speech" in error(capsys, "serve", "--synthetic", "--model", "vc")[1]
    (tmp_path / "turbo.toml").write_text('memory_budget = "8GB"\nbudget_slots = 2\n')
    code, message = error(capsys, "serve", "--synthetic", "--slots", "3", "--config", str(tmp_path / "turbo.toml"))
    assert code == 2 and "slots is 3" in message and "planned for 2 at once" in message
    with pytest.raises(TurboError, match="Cannot listen"):
        listen("192.0.2.1", 80)


def test_the_command_serves_until_it_is_told_to_end(tmp_path):
    require("turbo")
    process = started(
        tmp_path, "serve", "--synthetic", "--model", "turbo", "--stop-after", "40", "--port", "0",
        CHATTERBOX_TURBO_API_KEY="secret",
    )  # fmt: skip
    errors: list[str] = []
    reading = threading.Thread(target=lambda: errors.extend(process.stderr))
    reading.start()
    try:
        line = process.stdout.readline()
        assert line.startswith("serving turbo at http://127.0.0.1:") and "with a key" in line, (line, errors)
        url = line.split()[3].rstrip(",")
        with (
            httpx.Client(
                base_url=url, timeout=200, headers={"Authorization": "Bearer secret"}, trust_env=False
            ) as client,
            client.stream("POST", SPEECH, json=asked(TEXT, stream=True)) as answer,
        ):
            first = next(blocks := answer.iter_raw())
            process.send_signal(signal.SIGTERM)
            assert len(first + b"".join(blocks)) >= 40 * 1_920
        assert process.wait(100) == 0 and process.stdout.read() == "ended.\n"
    finally:
        process.kill()
        process.wait()
        reading.join()
    assert not [line for line in errors if "Error" in line or "Traceback" in line], errors
