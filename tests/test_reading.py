"""A book to an audio file: times of chapters, formats, encodings, memory, and what is no text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import reading_tools
import soundfile
import torch
from cli_tools import watermark_in
from reading_tools import SETTINGS, names

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError, UnavailablePassError
from chatterbox_turbo.speech import long_text, reading
from chatterbox_turbo.speech.book import Book

book, english = reading_tools.book, reading_tools.english


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
