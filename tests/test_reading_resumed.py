"""A book that is read on after an interruption: at any write, with a full disk, and not as something else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import reading_tools
from cli_tools import ROOT
from reading_tools import SETTINGS, names

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError, TurboError
from chatterbox_turbo.speech import files, parts

book, english = reading_tools.book, reading_tools.english


@pytest.mark.exhaustive
def test_an_interrupt_at_any_write_and_the_same_to_the_bit(english, book, monkeypatch):
    output = book.with_name("b.wav")
    english.turbo.read(book, output, seed=3)
    expected, written, count = output.read_bytes(), files.written, 0
    marks = book.with_name("b.chapters.json").read_bytes()
    # of the writes of a run: manifest, (piece, piece, wave) x 3, audio, chapters
    for at in (1, 2, 4, 6, 11, 12):
        output.unlink()

        def interrupted(path, at=at):
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            return written(path)

        with monkeypatch.context() as patch:
            count = 0
            patch.setattr(files, "written", interrupted)
            with pytest.raises(KeyboardInterrupt):
                english.turbo.read(book, output, seed=3)
        assert output.exists() == (at == 12)
        assert not list(book.parent.rglob(".*.partial"))
        assert book.with_name("b.wav.parts").exists() == (at > 1)
        report = english.turbo.read(book, output, seed=3)
        assert report.resumed == (0 if at < 5 else 2 if at < 8 else 6), at
        assert output.read_bytes() == expected and book.with_name("b.chapters.json").read_bytes() == marks
        assert names(book.parent) == ["b.chapters.json", "b.wav", "book.txt"]


def test_resuming_something_else_is_refused(english, book):
    output = book.with_name("c.wav")

    def stop(now):
        if now.pieces:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        english.turbo.read(book, output, progress=stop)
    folder = book.with_name("c.wav.parts")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    for change, told in (
        ({"seed": 1}, r"seed is 1 \(it was 0\)"),
        ({"temperature": 0.5}, r"arguments.temperature is 0.5 \(it was None\)"),
        ({"voice": long_voice(english)}, "voice is "),
    ):
        with pytest.raises(InvalidRequestError, match=told) as caught:
            english.turbo.read(book, output, **change)
        assert "--restart" in str(caught.value)
    turbo.apply(english, {**SETTINGS, "text": {**SETTINGS["text"], "loudness": False}})
    with pytest.raises(InvalidRequestError, match=r"configuration.text.loudness is False \(it was True\)"):
        english.turbo.read(book, output)
    turbo.apply(english, SETTINGS)
    book.write_text("Something else.")
    with pytest.raises(InvalidRequestError, match="book is "):
        english.turbo.read(book, output)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    report = english.turbo.read(book, output, restart=True)
    assert (report.resumed, report.pieces) == (0, 1) and not folder.exists()
    with pytest.raises(InvalidRequestError, match="exists already"):
        english.turbo.read(book, output)
    assert english.turbo.read(book, output, restart=True).pieces == 1


def long_voice(model):
    from chatterbox_turbo.upstream.warmup import copy_voice

    voice = copy_voice(model.conds)
    voice.gen = {**voice.gen, "embedding": voice.gen["embedding"] + 1}
    return voice


def test_another_process_has_the_folder(english, book):
    pytest.importorskip("fcntl")
    folder = parts.PartsFolder(book.with_name("d.wav.parts"))
    with folder.held(), pytest.raises(InvalidRequestError, match="Another process"):
        english.turbo.read(book, book.with_name("d.wav"))
    assert names(book.parent) == ["book.txt"]


def test_without_locks_no_file_is_held_open_that_could_not_be_deleted(tmp_path, monkeypatch):
    monkeypatch.delattr(parts, "fcntl", raising=False)  # as on Windows
    folder = parts.PartsFolder(tmp_path / "d.wav.parts")
    with folder.held():
        assert folder.path.is_dir() and not list(folder.path.iterdir())
        folder.begin({"book": 1})
        folder.remove()
    assert not folder.path.exists()


def test_damaged_pieces_are_said_again(english, book):
    output = book.with_name("e.wav")
    english.turbo.read(book, output, keep_parts=True)
    expected = output.read_bytes()
    piece = book.with_name("e.wav.parts") / "00001-01.wav"
    piece.write_bytes(piece.read_bytes()[:-100])
    assert english.turbo.read(book, output).resumed == 2
    assert output.read_bytes() == expected


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path):
    """``RLIMIT_FSIZE``: the system refuses to let a file grow, as a full disk does."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from chatterbox_turbo.errors import TurboError
from chatterbox_turbo.speech.files import audio_written, write_json, write_piece

noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
for name in ("a.wav", "a.flac", "a.opus"):
    Path(name).write_bytes(b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
def audio(path):
    with audio_written(path, 24_000) as write:
        for _ in range(40):
            write(noise)
failing = (audio, Path("a.wav")), (audio, Path("a.flac")), (audio, Path("a.opus")), \\
    (lambda path: write_piece(path, np.zeros(40_000, np.int16), 24_000), Path("p.wav")), \\
    (lambda path: write_json(path, "x" * 70_000), Path("p.json"))
for function, path in failing:
    try:
        function(path)
    except TurboError as error:
        print(error)
"""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line, name in zip(lines, ("a.wav", "a.flac", "a.opus", "p.wav", "p.json"), strict=True):
        assert line == f"{name} cannot be written: File too large. {files.KEPT}"
    assert names(tmp_path) == ["a.flac", "a.opus", "a.wav"]
    assert all((tmp_path / name).read_bytes() == b"old" for name in names(tmp_path))


@pytest.mark.exhaustive
def test_a_disk_that_fills_while_a_book_is_read(english, book):
    """A real file system that is full: what is finished is kept, and with more room the reading goes on."""
    disk = book.with_name("disk")
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=240k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(TurboError, match=r"No space left on device\. Make room"):
            english.turbo.read(book, disk / "h.wav", seed=3)
        kept = len(list((disk / "h.wav.parts").glob("*.json"))) - 1
        assert kept > 0 and not (disk / "h.wav").exists() and not list(disk.rglob(".*.partial"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        report = english.turbo.read(book, disk / "h.wav", seed=3)
        assert report.resumed == 2 * kept
        english.turbo.read(book, book.with_name("h.wav"), seed=3)
        assert (disk / "h.wav").read_bytes() == book.with_name("h.wav").read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
