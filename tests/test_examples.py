"""The examples run, and the example configuration names everything that can be configured."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tomlkit
from cases import require
from cli_tools import ROOT

import chatterbox_turbo as turbo
from chatterbox_turbo import OptimizationConfig
from chatterbox_turbo.config import Section, resolve

TURBO_TOML = Path(__file__).parent.parent / "examples" / "turbo.toml"


def unnamed(data, model=OptimizationConfig, prefix=""):
    """Options of a configuration that ``data`` does not set, as dotted keys."""
    for key, option in model.model_fields.items():
        section = isinstance(option.annotation, type) and issubclass(option.annotation, Section)
        if section:
            yield from unnamed(data.get(key, {}), option.annotation, f"{prefix}{key}.")
        elif key not in data:
            yield prefix + key


def test_the_example_names_every_option():
    # options that are commented out have no value that does nothing
    text = re.sub(r"^# (\w+ = )", r"\1", TURBO_TOML.read_text(encoding="utf-8"), flags=re.MULTILINE)
    data = tomlkit.parse(text)
    assert list(unnamed(data)) == []
    del data["watermark"]["detect"], data["fidelity"], data["vram_budget"]  # a model has one budget
    assert sorted(unnamed(data)) == ["fidelity", "vram_budget", "watermark.detect"]
    assert resolve(TURBO_TOML).sections()
    data["vocoder"]["kind"] = "vocos"  # whose checkpoint it is
    assert OptimizationConfig(**{**data, "fidelity": "lossy"}).flow.steps == 5  # and those values are valid


def run(tmp_path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.mark.exhaustive
def test_the_voice_agent_speaks_sentence_by_sentence(tmp_path):
    require("turbo")
    done = run(tmp_path, ROOT / "examples" / "voice_agent.py")
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"([\d.]+) s of speech, the first of its sentence after ([\d.]+) s", done.stdout)
    assert len(lines) >= 3 and sum(float(seconds) for seconds, _ in lines) > 1.0  # at least a block for each sentence


@pytest.mark.exhaustive
def test_lines_of_json_become_recordings(tmp_path):
    lines = [{"text": "One."}, {"text": "Two.", "temperature": -1}, {"text": "Three.", "seed": 9}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run(tmp_path, ROOT / "examples" / "batch_jsonl.py", "in.jsonl", "out")
    assert done.returncode == 1 and "line 2: temperature is -1" in done.stderr, done.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["00001.wav", "00003.wav"]
    assert soundfile.info(tmp_path / "out" / files[0]).samplerate == 24_000


def test_a_book_is_read_and_goes_on_after_an_interruption(models, prebuilt, tmp_path, voice, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["audiobook.py", "--synthetic"])
    spec = importlib.util.spec_from_file_location("audiobook", ROOT / "examples" / "audiobook.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    show = example.show
    (tmp_path / "book.txt").write_text("# One\n\nA fox.\n\n# Two\n\nA dog.\n")
    given = Path("book.txt"), Path("book.flac"), Path(voice)

    def interrupted(now):
        show(now)
        if now.pieces == 4:  # all of them are there, and no file is
            raise KeyboardInterrupt

    monkeypatch.setattr(example, "show", interrupted)
    with pytest.raises(SystemExit, match=r"it goes on with what is in book\.flac\.parts"):
        example.main(*given)
    assert not (tmp_path / "book.flac").exists()
    turbo.revert(models("english"))  # the next run has a model of its own
    monkeypatch.setattr(example, "show", show)
    example.main(*given)
    shown = capsys.readouterr().out
    assert "book.flac, book.srt, book.chapters.json: " in shown and "4 pieces, 4 of them from an earlier run" in shown
    assert soundfile.info("book.flac").duration > 1 and not Path("book.flac.parts").exists()
    assert [one["title"] for one in json.loads(Path("book.chapters.json").read_text())] == ["One", "Two"]


@pytest.mark.exhaustive
def test_the_server_streams_to_a_client(tmp_path):
    require("turbo")
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi"), pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = str(ROOT / "examples")
    command = [sys.executable, "-m", "uvicorn", "--app-dir", folder, "--port", str(port), "speech_server:app"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        url, until = f"http://127.0.0.1:{port}/speech", time.monotonic() + 200
        while True:
            try:
                assert httpx.get(url, params={"text": ""}).status_code == 422
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.5)
        text = "The quick brown fox jumps over the lazy dog."
        with httpx.stream("GET", url, params={"text": text, "seed": 3}, timeout=200) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"] == "audio/wav"
            body = b"".join(answer.iter_bytes())
        assert body[:4] == b"RIFF" and body[36:40] == b"data"
        samples = np.frombuffer(body[44:], "<i2")
        assert len(samples) > 20 * 960 and np.abs(samples).max() > 100
        with httpx.stream("GET", url, params={"text": text}, timeout=200) as answer:
            next(answer.iter_bytes())  # and goes away
        assert httpx.get(url, params={"text": text, "seed": 3}, timeout=200).content == body
    finally:
        server.terminate()
        server.wait(30)
