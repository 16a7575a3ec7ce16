"""``read``: what it writes and says, with a named voice, ended by signals, and what it says of misuse."""

from __future__ import annotations

import re
import signal
import time

import pytest
import reading_tools
from cli_tools import error, started, watermark_in
from reading_tools import TOML, names

import chatterbox_turbo as turbo
from chatterbox_turbo.cli import main

book, english = reading_tools.book, reading_tools.english


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        (("read", "{folder}/none.txt"), 2, ["none.txt"]),
        (("read", "{folder}/book.txt", "-o", "{folder}/a.mp3"), 1, ["audio format '.mp3'", ".flac"]),
        (("read", "{folder}/book.txt", "-o", "{folder}/none/a.wav"), 2, ["cannot write"]),
        (("read", "{folder}/book.txt", "--model", "vc"), 2, ["vc converts speech"]),
        (("read", "{folder}/bad.txt"), 1, ["is not in utf-8", "--encoding"]),
        (("read", "{folder}/book.txt", "--language", "fr"), 2, ["--language fr"]),
        (("read", "{folder}/book.txt", "--voice", "anna"), 2, ["'anna' does not exist", "--voice-folder"]),
        (("read", "{folder}/book.txt", "--voice-folder", "{folder}"), 2, ["needs --voice NAME"]),
        (("read", "{folder}/book.txt", "--voice", "anna", "--voice-folder", "{folder}"), 1, ["no voice 'anna' in"]),
    ],
)
def test_misuse(capsys, tmp_path, arguments, code, fragments):
    (tmp_path / "book.txt").write_text("Hello.")
    (tmp_path / "bad.txt").write_bytes(b"Gr\xfc\xdfe.")
    found, line = error(capsys, *(argument.format(folder=tmp_path) for argument in arguments))
    assert found == code
    for fragment in fragments:
        assert fragment in line
    assert names(tmp_path) == ["bad.txt", "book.txt"]


def test_the_command(prebuilt, book, capsys):
    (book.parent / "c.toml").write_text(TOML)
    arguments = ["read", str(book), "--synthetic", "--config", str(book.parent / "c.toml")]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert watermark_in(book.with_suffix(".flac")) > 1.0
    assert "6 pieces, 0 of an earlier run; 0 said again, 0 kept though they went wrong" in shown.out
    assert "x real time)" in shown.out and "book.chapters.json: times of chapters" in shown.out
    assert "reading: 6 of 6 pieces" in shown.err and "Warning" not in shown.err
    book.write_text("🙂")
    code, line = error(capsys, *arguments, "--restart")
    assert code == 1 and "nothing that can be said" in line


def test_a_named_voice(english, prebuilt, book, capsys, voice):
    english.turbo.voices.add("anna", voice)
    english.turbo.voices.save(book.parent / "voices")
    turbo.revert(english)
    (book.parent / "c.toml").write_text(TOML)
    book.write_text("One fox.")
    arguments = ["read", str(book), "--synthetic", "--config", str(book.parent / "c.toml"), "--keep-parts"]
    assert main([*arguments, "--voice", "anna", "--voice-folder", str(book.parent / "voices")]) == 0
    assert watermark_in(book.with_suffix(".flac")) > 0
    turbo.revert(english)
    capsys.readouterr()
    code, line = error(capsys, *arguments)  # the model's own voice
    assert code == 1 and "holds pieces of another reading: voice is" in line and "arguments" not in line


@pytest.mark.exhaustive
def test_signals(tmp_path, saved, monkeypatch, capsys):
    """The command of a user, ended twice, each time in another wave: what is finished is kept."""
    (tmp_path / "book.txt").write_text("One fox jumps over a dog. " * 49)
    (tmp_path / "c.toml").write_text(TOML)
    checkpoint = ("--checkpoint", str(saved("english")), "--size", "tiny", "--config", "c.toml")
    arguments = ("read", "book.txt", "-o", "a.flac", *checkpoint)
    for number, how in enumerate((signal.SIGKILL, signal.SIGTERM)):
        running, end = started(tmp_path, *arguments), time.monotonic() + 900
        while running.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
            if (tmp_path / "a.flac.parts" / f"{number:05d}.json").exists():
                running.send_signal(how)
                break
        _, err = running.communicate(timeout=120)
        assert running.returncode == (-how if how is signal.SIGKILL else 130), err
        assert not (tmp_path / "a.flac").exists() and (tmp_path / "a.flac.parts" / "reading.json").exists()
        if how is not signal.SIGKILL:
            assert "what is finished is kept in a.flac.parts" in err
    monkeypatch.chdir(tmp_path)
    assert main([*arguments]) == 0
    out = capsys.readouterr().out
    # two waves were written; whether a third was finished before the second signal is a matter of time
    assert re.search(r"49 pieces, (32|48) of an earlier run", out), out
    assert watermark_in(tmp_path / "a.flac") > 40 and names(tmp_path) == ["a.flac", "book.txt", "c.toml"]
