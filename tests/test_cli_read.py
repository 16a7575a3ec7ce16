"""``read``: what it writes, interruptions at every point, resuming, a full disk, and what it says of bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cli_tools import ROOT, error, started, watermark_in

import chatterbox_turbo as turbo
from chatterbox_turbo.cli import main
from chatterbox_turbo.errors import InvalidRequestError, TurboError, UnavailablePassError
from chatterbox_turbo.speech import files, long_text, parts, reading
from chatterbox_turbo.speech.book import Book

CHAPTERS = """Chapter 1

One fox jumps over a dog. Is it two of them, or is it three?

Chapter 2

There will be more of them. Or there will be none of them at all.
"""
SETTINGS = {"decoding": {"progress": "off", "kernel": "torch"}, "text": {"retries": 0, "target": 1.5, "longest": 3.0}}
TOML = 'text = {retries = 0, target = 1.5, longest = 3.0}\ndecoding = {kernel = "torch"}\n'


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Six pieces in three waves; random weights end where they were told to, not where their text ends."""
    monkeypatch.setattr(reading, "WAVE", 2)
    monkeypatch.setattr(long_text, "MISSING", 0.0)
    path = tmp_path / "book.txt"
    path.write_text(CHAPTERS)
    return path


@pytest.fixture
def english(models):
    built = models("english")
    turbo.apply(built, SETTINGS)
    yield built
    turbo.revert(built)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_book_with_the_times_of_its_chapters(english, book):
    told, own = [], english.conds
    state = torch.get_rng_state()
    report = english.turbo.read(book, book.with_name("a.flac"), seed=3, progress=told.append, keep_parts=True)
    assert english.conds is own and torch.equal(torch.get_rng_state(), state)
    assert watermark_in(report.files[0]) == pytest.approx(report.seconds)
    assert (report.pieces, report.resumed, report.retried, report.faulty) == (6, 0, 0, ())
    assert [now.pieces for now in told] == [0, 2, 4, 6] and told[-1].tokens == pytest.approx(told[-1].all_tokens)
    marks = json.loads(report.chapters.read_text())
    assert [(one["chapter"], one["title"]) for one in marks] == [(1, "Chapter 1"), (2, "Chapter 2")]
    assert marks[0]["start"] == 0.0 and marks[0]["end"] == marks[1]["start"] > 1.0
    assert marks[1]["end"] == pytest.approx(report.seconds, abs=1e-3)
    folder = book.with_name("a.flac.parts")
    pieces = [one for number in range(3) for one in json.loads((folder / f"{number:05d}.json").read_bytes())]
    joined = np.concatenate([soundfile.read(folder / one["file"], dtype="int16")[0] for one in pieces])
    assert np.array_equal(joined, soundfile.read(report.files[0], dtype="int16")[0])
    with pytest.raises(InvalidRequestError, match="seed is 4"):
        english.turbo.read(book, book.with_name("a.flac"), seed=4)
    # of the pieces that are there
    split = english.turbo.read(book, book.with_name("a.flac"), seed=3, chapters=True, subtitles="srt")
    assert split.resumed == 6 and split.said == 0.0 and split.real_time_factor is None
    assert [path.name for path in split.files] == ["a-01.flac", "a-02.flac"] and split.chapters is None
    parts_of_it = [soundfile.read(path, dtype="int16")[0] for path in split.files]
    assert np.array_equal(np.concatenate(parts_of_it), joined)
    assert names(book.parent) == [
        "a-01.flac", "a-01.srt", "a-02.flac", "a-02.srt", "a.chapters.json", "a.flac", "book.txt"]  # fmt: skip
    assert split.subtitles == (book.with_name("a-01.srt"), book.with_name("a-02.srt"))
    lines = split.subtitles[0].read_text().split("\n\n")
    assert lines[0].startswith("1\n00:00:00,000 --> ") and lines[0].endswith("\nChapter 1") and len(lines) > 1


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


def test_damaged_pieces_are_said_again(english, book):
    output = book.with_name("e.wav")
    english.turbo.read(book, output, keep_parts=True)
    expected = output.read_bytes()
    piece = book.with_name("e.wav.parts") / "00001-01.wav"
    piece.write_bytes(piece.read_bytes()[:-100])
    assert english.turbo.read(book, output).resumed == 2
    assert output.read_bytes() == expected


def test_memory_does_not_grow_with_the_book(english, book, monkeypatch):
    """No more pieces are cut, and none are held, than those of a wave."""
    book.write_text("One fox jumps over a dog.\n\n" * 20)
    alive, cut, most = [], 0, 0
    said, pieces = long_text.LongText.say, reading.pieces

    def counted(*args, **kwargs):
        nonlocal cut
        for piece in pieces(*args, **kwargs):
            cut += 1
            yield piece

    def watched(self, some, *rest):
        nonlocal most
        alive.append(cut - before)
        most = max(most, len(list(some)))
        yield from said(self, some, *rest)

    def one_wave(now):
        assert now.pieces <= 4
        if now.pieces == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(reading, "pieces", counted)
    monkeypatch.setattr(long_text.LongText, "say", watched)
    before = 21  # the survey has seen all of them, and the first one was asked for
    with pytest.raises(KeyboardInterrupt):
        english.turbo.read(book, book.with_name("f.wav"), progress=one_wave)
    assert alive == [2, 4] and most == 2


def test_opus(english, book):
    book.write_text("One fox jumps over a dog.")
    for name in ("g.opus", "g.ogg"):
        report = english.turbo.read(book, book.with_name(name))
        info = soundfile.info(report.files[0])
        assert (info.format, info.subtype, info.samplerate) == ("OGG", "OPUS", 24_000)
        assert info.duration == pytest.approx(report.seconds, abs=0.05) and report.chapters is None
        assert watermark_in(report.files[0]) == pytest.approx(report.seconds, abs=0.05)


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


def test_a_model_that_cannot(english, book):
    turbo.apply(english, {**SETTINGS, "text": {"enabled": False}})
    with pytest.raises(UnavailablePassError, match=r"need the text pass.*text.enabled = true"):
        english.turbo.read(book, book.with_name("i.wav"))


@pytest.mark.parametrize(
    ("data", "encoding", "fragment"),
    [
        (b"", "utf-8", "nothing that can be said"),
        ("\ufeff \n🙂 …\n".encode(), "utf-8", "nothing that can be said"),
        ("Grüße.".encode("latin-1"), "utf-8", "is not in utf-8. After character 0"),
        ("Hello.".encode("utf-16"), "utf-8", "is in UTF-16"),
        (b"H\0e\0l\0l\0o\0", "utf-8", "has zero characters"),
        (b"%PDF-1.7 \x00", "utf-8", "is a PDF file"),
        (b"Hello.", "utf-9", "no encoding 'utf-9'"),
    ],
)
def test_what_is_no_text(tmp_path, data, encoding, fragment):
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    with pytest.raises(InvalidRequestError, match=fragment):
        Book(path, encoding).survey(reading.pieces(Book(path, encoding).text()))


def test_encodings(tmp_path):
    path = tmp_path / "book.txt"
    text = "Grüße.\nZeile zwei.\n"
    for encoding, told in (("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-16", "utf-16"), ("cp1252", "cp1252")):
        path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert "".join(Book(path, told).text()) == text


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
