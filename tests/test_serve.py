"""``serve``: speech over HTTP, by real clients of a real server, several at once."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import serve_tools
import soundfile
from serve_tools import LONG, SPEECH, TEXT, VOICES, asked, pcm, samples, serving, wait

from chatterbox_turbo.runtime.t3.service import Service
from chatterbox_turbo.server import audio
from chatterbox_turbo.speech.files import as_16_bit
from chatterbox_turbo.speech.stream import joined

speaker, client = serve_tools.speaker, serve_tools.client


@pytest.fixture(scope="module")
def running(speaker):
    with serving(speaker) as started:
        yield started


def test_the_answer_is_what_the_model_says(client, speaker):
    expected = as_16_bit(joined(list(speaker.turbo.stream(TEXT, seed=3)))[0].numpy())
    live = client.post(SPEECH, json=asked(stream=True))
    assert live.headers["content-type"] == "audio/pcm" and live.headers["x-sample-rate"] == "24000"
    assert np.array_equal(pcm(live.content), expected)
    whole = client.post(SPEECH, json=asked())
    assert len(pcm(whole.content)) == len(expected) and whole.headers["content-length"] == str(2 * len(expected))
    assert float(whole.headers["x-audio-seconds"]) == pytest.approx(len(expected) / 24_000, abs=1e-3)
    drawn = client.post(SPEECH, json={**asked(), "seed": None})
    again = client.post(SPEECH, json=asked(seed=int(drawn.headers["x-seed"])))
    assert drawn.content == again.content != whole.content


@pytest.mark.parametrize("name", ["mp3", "opus", "flac", "wav"])
def test_each_format_holds_all_of_it_streamed_or_not(client, name):
    if name not in audio.available():
        pytest.skip(f"this libsndfile does not write {name}")
    reference = pcm(client.post(SPEECH, json=asked()).content)
    for more in ({}, {"stream": True}):
        answer = client.post(SPEECH, json=asked(response_format=name, **more))
        assert answer.status_code == 200 and answer.headers["content-type"] == audio.content_type(name)
        assert ("content-length" in answer.headers) == (not more)
        found = samples(answer.content, len(reference))
        if name in ("flac", "wav") and not more:
            assert np.array_equal(found, reference)
        assert 0 <= len(found) - len(reference) < 2_000, "a coder's own padding at most"
    assert soundfile.info(io.BytesIO(client.post(SPEECH, json=asked(response_format="wav")).content)).frames == len(
        reference
    )


def test_events_hold_the_same_bytes_and_figures(client):
    answer = client.post(SPEECH, json=asked(stream_format="sse"))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert {one["type"] for one in events[:-1]} == {"speech.audio.delta"} and len(events) > 2
    content = b"".join(base64.b64decode(one["audio"]) for one in events[:-1])
    assert content == client.post(SPEECH, json=asked(stream=True)).content
    assert events[-1]["type"] == "speech.audio.done" and events[-1]["usage"]["output_tokens"] >= 40
    assert events[-1]["audio_seconds"] == pytest.approx(len(content) / 48_000)


def test_eight_clients_at_once_each_get_what_they_would_get_alone(client, running):
    requests = [asked(f"{TEXT} Number {n}.", seed=n, stream=n % 2 == 0) for n in range(8)]
    alone = [pcm(client.post(SPEECH, json=one).content) for one in requests]
    most = []

    def speak(request):
        with running.client() as own:
            return pcm(own.post(SPEECH, json=request).content)

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(speak, one) for one in requests]
        while not all(one.done() for one in futures):
            most.append(running.served.worker.in_flight)
        together = [one.result() for one in futures]
    assert max(most) > 2, "they were in flight one after the other"
    for found, expected in zip(together, alone, strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.abs(together[0][:5_000] - together[1][:5_000]).max() > 100


MALFORMED = {
    "no input": ({"input": None}, 400, "input"),
    "empty": ({"input": " \n"}, 400, "no letter"),
    "too long": ({"input": "a" * 4097}, 400, "4,097 characters"),
    "half a surrogate": ({"input": "\ud83d a"}, 400, "input"),
    "a path": ({"voice": "../../etc/passwd"}, 400, "no voice"),
    "unknown field": ({"colour": "red"}, 400, "colour"),
    "another model": ({"model": "whisper-1"}, 404, "no model"),
    "format": ({"response_format": "aac"}, 400, "must be one of"),
    "speed": ({"speed": 1.5}, 400, "only 1.0"),
    "instructions": ({"instructions": "Whisper."}, 400, "no instructions"),
    "another family's": ({"cfg_weight": 0.5}, 400, "has no cfg_weight"),
    "language": ({"language": "fr"}, 400, "English only"),
    "out of range": ({"temperature": -1.0}, 400, "temperature is -1"),
    "seed": ({"seed": 2**60}, 400, "seed"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_cannot_be_done_is_told(client, case):
    body, status, words = MALFORMED[case]
    answer = client.post(SPEECH, content=json.dumps(asked() | body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 20_000, 400),
        (b'{"input": 1e999}', 400),
        (b'{"input": "a", "seed": ' + b"9" * 5_000 + b"}", 400),
        (b"\xff\xfe{}", 400),
        (b'{"input": "a", "temperature": NaN}', 400),
        (b"x" * 100_000, 413),
    ],
)
def test_a_body_that_is_none_is_told(client, body, status):
    answer = client.post(SPEECH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["message"], answer.text


def test_other_routes(client, running):
    assert client.get("/health").json() == {"status": "ok", "model": "turbo", "ready": True}
    assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200
    assert [one["id"] for one in client.get("/v1/models").json()["data"]][:2] == ["turbo", "tts-1"]
    assert client.get("/nothing").json()["error"]["code"] == "not_found"
    assert client.get(SPEECH).json()["error"]["code"] == "method_not_allowed"
    foreign = client.post(SPEECH, json=asked(), headers={"Sec-Fetch-Site": "cross-site"})
    assert foreign.status_code == 403
    # as a browser does it where the address is another machine's, without TLS
    for origin, status in (("http://evil.example", 403), ("null", 403), (running.url.upper(), 200)):
        assert client.post(SPEECH, json=asked(), headers={"Origin": origin}).status_code == status, origin
    client.post(SPEECH, json=asked(stream=True))
    running.settle()
    wait(lambda: 'outcome="done"' in client.get("/metrics").text)
    figures = dict(
        line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line.startswith("chatterbox_turbo")
    )
    for name in ('first_audio_seconds_count{stream="yes"}', "real_time_factor_count", "audio_seconds_total"):
        assert float(figures[f"chatterbox_turbo_{name}"]) > 0
    assert float(figures["chatterbox_turbo_waiting_requests"]) == 0
    assert float(figures['chatterbox_turbo_responses_total{route="other",status="404"}']) >= 1


def test_a_voice_is_uploaded_spoken_with_kept_and_deleted(speaker, tmp_path, voice):
    recording = Path(voice).read_bytes()
    with serving(speaker, tmp_path) as running, running.client() as client:
        made = client.post(VOICES, data={"name": "anna"}, files={"audio_sample": ("../x.wav", recording)})
        assert made.status_code == 201 and made.json()["id"] == "anna", made.text
        assert [one["id"] for one in client.get(VOICES).json()["voices"]] == ["default", "anna"]
        own, hers = (pcm(client.post(SPEECH, json=asked(voice=v)).content) for v in ("default", "anna"))
        assert len(own) != len(hers) or np.abs(own - hers).max() > 10
        for name, status in (("anna", 409), ("ANNA", 409), ("default", 409), ("../x", 400), ("", 400), ("a\0", 400)):
            again = client.post(VOICES, data={"name": name}, files={"audio_sample": ("a", recording)})
            assert again.status_code == status, (name, again.text)
        assert [path.name for path in tmp_path.iterdir()] == ["anna.safetensors"]
    speaker.turbo.voices.remove("anna")
    with serving(speaker, tmp_path) as running, running.client() as client:
        assert np.array_equal(pcm(client.post(SPEECH, json=asked(voice="anna")).content), hers)
        for name, status in (("default", 409), ("ben", 404), ("..%2Fanna", 404), ("anna", 200), ("anna", 404)):
            assert client.delete(f"{VOICES}/{name}").status_code == status, name
        assert not [*tmp_path.iterdir()] and client.post(SPEECH, json=asked(voice="anna")).status_code == 400


def turbo_voice(speaker, path: Path, recording: str) -> bytes:
    """The file of another voice: of a recording backwards."""
    samples, rate = soundfile.read(recording)
    soundfile.write(path.with_suffix(".wav"), samples[::-1], rate)
    speaker.turbo.voices.add("other", path.with_suffix(".wav"))
    speaker.turbo.voices.export("other", path)
    speaker.turbo.voices.remove("other")
    return path.read_bytes()


def test_what_others_do_to_the_folder_of_voices_is_noticed(speaker, tmp_path, voice):
    with serving(speaker, tmp_path) as running, running.client() as client:
        form = {"data": {"name": "anna"}, "files": {"audio_sample": ("a", Path(voice).read_bytes())}}
        assert client.post(VOICES, **form).status_code == 201
        hers = pcm(client.post(SPEECH, json=asked(voice="anna")).content)
        (tmp_path / "ben.safetensors").write_bytes((tmp_path / "anna.safetensors").read_bytes())
        (tmp_path / "bad.safetensors").write_text("no voice")
        assert np.array_equal(pcm(client.post(SPEECH, json=asked(voice="ben")).content), hers)
        # half of a file is none yet, and what is there already stays until the other half is there as well
        other = turbo_voice(speaker, tmp_path.parent / "other.safetensors", voice)
        for content, expected in ((other[:1000], hers), (other, None)):
            (tmp_path / "ben.safetensors").write_bytes(content)
            now = pcm(client.post(SPEECH, json=asked(voice="ben")).content)
            same = now.shape == hers.shape and np.array_equal(now, hers)
            assert same == (expected is hers)
        (tmp_path / "anna.safetensors").unlink()
        assert [one["id"] for one in client.get(VOICES).json()["voices"]] == ["default", "ben"]
        assert client.post(SPEECH, json=asked(voice="anna")).status_code == 400
        assert client.delete(f"{VOICES}/ben").status_code == 200
        # as a Mac writes it
        (tmp_path / "Ame\u0301lie.safetensors").write_bytes(other)
        assert client.delete(f"{VOICES}/Am\u00e9lie").status_code == 200
        assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_key_is_asked_for(speaker):
    with serving(speaker, key="secret") as running, running.client() as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Basic secret"},
        ):
            for path in (VOICES, "/metrics", "/v1/models", "/openapi.json", "/nothing"):
                refused = client.get(path, headers=headers)
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert client.post(SPEECH, json=asked(), headers=headers).status_code == 401
        assert client.get("/health").status_code == client.get("/").status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert client.get(VOICES, headers=key).status_code == 200
        assert client.post(SPEECH, json=asked(), headers=key).status_code == 200


def test_what_does_not_fit_the_queue_is_refused_and_who_leaves_makes_room(speaker, monkeypatch):
    engine, step, count, go = speaker.turbo.token_model, Service._step, [], threading.Event()

    def held(service):
        count.append(1)
        assert len(count) < 60 or go.wait(200)  # after a first block nothing goes on until it may
        step(service)

    monkeypatch.setattr(Service, "_step", held)
    with (
        serving(speaker, slots=1, queue=1) as running,
        running.client() as first,
        running.client() as second,
        ThreadPoolExecutor(1) as pool,
    ):
        worker = running.served.worker
        with first.stream("POST", SPEECH, json=asked(LONG, stream=True)) as answer:
            blocks = answer.iter_raw()  # kept: without it the connection would be closed
            next(blocks)
            with socket.create_connection(("127.0.0.1", running.port)) as hasty:
                body = json.dumps(asked()).encode()
                head = f"POST {SPEECH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                hasty.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                wait(lambda: worker.waiting == 1)
                refused = second.post(SPEECH, json=asked())
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "busy" and worker.waiting == 1
            wait(lambda: worker.waiting == 0)
            waiting = pool.submit(second.post, SPEECH, json=asked())
            wait(lambda: worker.waiting == 1)
        go.set()  # the first one has left in the middle of its speech
        assert waiting.result().status_code == 200
        running.settle()
        assert len(engine.service) == 0 and engine.service._run is None
        wait(lambda: 'speech_requests_total{outcome="cancelled"} 2.0' in running.served.measures.text().decode())
        assert 'speech_requests_total{outcome="done"} 1.0' in running.served.measures.text().decode()
