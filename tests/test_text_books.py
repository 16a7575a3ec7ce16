"""Long texts: linear time, and no more of a book in memory than a paragraph."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from text_tools import book

from chatterbox_turbo.text import pieces, split

LINEAR = {
    "prose": "Dr. Smith met Mrs. Jones at 5 p.m. on Main St. “Are you mad?” he asked. It costs $3.50... No! ",
    "paragraphs": "It was late. Nobody came, and so they left; the door was open.\n\n",
    "no space": "abcdefghij",
    "quotes": "“a”",
    "open quotes": "a“ ",
    "initials": "a. b. ",
    "chinese": "你好",
    "chinese prose": "我们今天去公园，看到了很多花。",
    "thai": "ภาษา",
    "numbers": "1 234 ",
    "addresses": "a@b.c",
    "brackets": "[(<a",
    "lines": "a line of a poem\n",
    "zero width": "\u200ba",
    "accents": "e\u0301",
}


@pytest.mark.parametrize("name", LINEAR)
def test_time_is_linear_in_the_length(name):
    """Twice the text in less than 2.5 times the time of this process, in one of four tries; a square would be 4."""
    unit = LINEAR[name]

    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        start = time.process_time()
        split(text)
        return time.process_time() - start

    seconds(1000)
    ratios = []
    for _ in range(4):
        ratios.append(seconds(40_000) / seconds(20_000))
        if ratios[-1] < 2.5:
            return
    raise AssertionError(ratios)


def test_a_megabyte():
    text = LINEAR["prose"] * (1_000_000 // len(LINEAR["prose"]))
    found = split(text)
    assert found[-1].end == len(text.rstrip()) and max(piece.seconds for piece in found) <= 18


def test_a_book_is_read_a_paragraph_at_a_time():
    read = 0

    def lines():
        nonlocal read
        for line in book(100_000):
            read += 1
            yield line

    found = pieces(lines(), "en")
    assert read == 0
    next(found), next(found)
    assert read < 60
    rest = list(found)
    assert read > 1000 and rest[-1].chapter > 4


def test_memory_does_not_grow_with_the_book():
    def peak(characters: int) -> int:
        tracemalloc.start()
        for _ in pieces(book(characters), "en"):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(3_000)
    assert peak(60_000) < 1.5 * peak(15_000) < 2_000_000


def test_an_open_file_can_be_read(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(book(3000)), encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        found = list(pieces(file, "en"))
    assert found == split(path.read_text(encoding="utf-8"), "en")
    assert found[0].heading and found[-1].end == len(path.read_text(encoding="utf-8").rstrip())
