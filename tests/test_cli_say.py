"""``say``: the speech that it writes, where the weights come from, and what it says of errors."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from cli_tools import ROOT, command, error, watermark_in

from chatterbox_turbo.cli import main


def test_say_reads_standard_input_and_writes_marked_speech(tmp_path):
    done = command(tmp_path, "say", "-o", "hello.wav", "--synthetic", "--seed", "3", stdin="Hello there.\n")
    assert done.returncode == 0, done.stderr
    assert watermark_in(tmp_path / "hello.wav") == pytest.approx(24 / 25)
    assert "SYNTHETIC" in done.stdout and "watermark detected" in done.stdout
    for noise in ("Warning", "PerthNet", "Sampling"):
        assert noise not in done.stdout + done.stderr


def test_say_with_a_voice_and_a_config_file(prebuilt, capsys, tmp_path, voice):
    (tmp_path / "c.yaml").write_text("decoding: {max_new_tokens: 10}\n")
    out = tmp_path / "out.flac"
    arguments = ["say", "Hello.", "-o", str(out), "--synthetic", "--voice", voice, "--config", str(tmp_path / "c.yaml")]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert watermark_in(out) == pytest.approx(10 / 25)
    assert "warning: Speech was cut at 10 tokens" in shown.err  # ours comes through, upstream's does not


def test_say_is_the_same_for_the_same_seed(prebuilt, tmp_path):
    files = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    for file, seed in zip(files, "112", strict=True):
        assert main(["say", "Hello.", "-o", str(file), "--synthetic", "--seed", seed]) == 0
    same, again, other = (file.read_bytes() for file in files)
    assert same == again != other


def test_say_shows_the_memory(prebuilt, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "out.wav", tmp_path / "memory.png"
    assert main(["say", "Hello.", "-o", str(out), "--synthetic", "--memory", "--memory-png", str(png)]) == 0
    said = capsys.readouterr().out
    for wanted in ("s3gen.tokenizer", "weights", "peaks by phase", f"{png}: memory over"):
        assert wanted in said, said
    assert png.read_bytes().startswith(b"\x89PNG")


def test_say_from_a_checkpoint_folder(capsys, tmp_path):
    from chatterbox_turbo import synthetic

    synthetic.save(tmp_path / "model", "multilingual", "tiny", 12)
    arguments = ["say", "Bonjour.", "--model", "multilingual", "--language", "fr", "--size", "tiny"]
    assert main([*arguments, "--checkpoint", str(tmp_path / "model"), "-o", str(tmp_path / "fr.wav")]) == 0
    assert watermark_in(tmp_path / "fr.wav") < 1.0
    assert "SYNTHETIC" not in capsys.readouterr().out


def test_say_takes_cached_weights_without_a_hub(no_hub, capsys, tmp_path):
    from chatterbox_turbo import synthetic

    repository = tmp_path / "cache" / "models--ResembleAI--chatterbox"
    synthetic.save(repository / "snapshots" / "0123", "english", "tiny", 12)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    with synthetic.architecture("tiny"):
        assert main(["say", "Hello.", "-o", str(tmp_path / "out.wav")]) == 0
    assert watermark_in(tmp_path / "out.wav") == pytest.approx(12 / 25)
    assert "SYNTHETIC" not in capsys.readouterr().out


def test_say_does_not_fall_back_to_random_weights(no_hub, capsys, tmp_path):
    code, line = error(capsys, "say", "hi", "-o", str(tmp_path / "out.wav"))
    assert code == 1
    assert "no weights for english" in line and "--synthetic" in line


def test_an_incomplete_checkpoint_folder(capsys, tmp_path):
    code, line = error(capsys, "say", "hi", "-o", str(tmp_path / "out.wav"), "--checkpoint", str(tmp_path))
    assert code == 1 and "lacks a file" in line


def test_a_recording_that_is_none(prebuilt, capsys, tmp_path):
    (tmp_path / "voice.wav").write_text("not audio")
    arguments = ("say", "hi", "-o", str(tmp_path / "out.wav"), "--synthetic", "--voice", str(tmp_path / "voice.wav"))
    code, line = error(capsys, *arguments)
    assert code == 1 and "is not" in line and "Convert it to WAV or FLAC" in line


def test_an_unwritable_output_leaves_nothing_behind(capsys, tmp_path):
    error(capsys, "say", "hi", "-o", str(tmp_path / "out.wav"), "--preset", "none")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_a_traceback_and_upstreams_chatter(prebuilt, capsys, tmp_path):
    (tmp_path / "voice.wav").write_text("not audio")
    arguments = ["say", "hi", "-o", str(tmp_path / "out.wav"), "--synthetic"]
    assert main(["--debug", *arguments, "--voice", str(tmp_path / "voice.wav")]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and "error: " in shown.splitlines()[-1]
    assert main(["--debug", *arguments]) == 0
    assert "Sampling" in capsys.readouterr().err


def test_a_format_without_a_header_is_refused_at_once(no_hub, capsys, tmp_path):
    for more in ([], ["--stream"]):
        code, line = error(capsys, "say", "Hello.", "-o", str(tmp_path / "hello.raw"), "--synthetic", *more)
        assert code == 2 and "unknown audio format '.raw'" in line and not list(tmp_path.iterdir())


def test_an_output_that_is_a_link_to_nothing_stays_one(capsys, tmp_path):
    (tmp_path / "out.wav").symlink_to(tmp_path / "later.wav")
    error(capsys, "say", "hi", "-o", str(tmp_path / "out.wav"), "--preset", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"] and (tmp_path / "out.wav").is_symlink()


@pytest.mark.exhaustive
def test_say_streams_to_standard_output_and_to_a_file(tmp_path):
    """Where no sound card is: 16-bit PCM, and what is said about it elsewhere."""
    arguments = [sys.executable, "-m", "chatterbox_turbo.cli", "say", "--stream", "Hello there.", "--synthetic"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*arguments, "-o", "-"], cwd=tmp_path, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    samples = np.frombuffer(done.stdout, "<i2")
    assert len(samples) >= 24 * 960 and np.abs(samples).max() > 100
    debug = [*arguments[:3], "--debug", *arguments[3:], "-o", "-", "--memory"]
    loud = subprocess.run(debug, cwd=tmp_path, capture_output=True, env=environment, timeout=300)
    assert loud.stdout == done.stdout and b"loaded PerthNet" in loud.stderr  # no text among the samples
    assert b"s3gen.tokenizer" in loud.stderr and b"SYNTHETIC" in loud.stderr
    assert b"of speech in" in done.stderr and b"the first after" in done.stderr and b"real time" in done.stderr


def test_say_streams_to_a_file(prebuilt, capsys, tmp_path):
    out = tmp_path / "out.wav"
    assert main(["say", "--stream", "Hello there.", "-o", str(out), "--synthetic", "--seed", "3", "--memory"]) == 0
    shown = capsys.readouterr()
    assert watermark_in(out) == pytest.approx(12 / 25) and "out.wav: " in shown.err
    assert "SYNTHETIC" in shown.err and "s3gen.tokenizer" in shown.err and not shown.out
    code, line = error(capsys, "say", "--stream", "Hello.", "-o", str(out), "--memory-png", "m.png")
    assert code == 2 and "--memory-png is without --stream" in line


def test_a_stream_that_cannot_be_heard_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("chatterbox_turbo.cli.playing.why_no_card", lambda: "no sound card (none)")
    code, line = error(capsys, "say", "--stream", "Hello.", "--synthetic")
    assert code == 2 and "no sound card (none)" in line and "aplay -f S16_LE" in line
