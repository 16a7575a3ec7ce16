"""The words of a text, and its letters as they can be told again in what a tokenizer has made of them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from .characters import UNSPACED, separable, speakable

_CHUNK = re.compile(r"\S+")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
HAN, UNKNOWN = "\u6f22", "\ufffd"  # any Chinese character, which a tokenizer may spell; one that it does not know


class Letter(NamedTuple):
    """A letter or digit, and where it begins and ends in what it comes from."""

    char: str
    start: float
    end: float


def words(text: str) -> list[tuple[int, int]]:
    """Beginning and end of each word, in order.

    A word is what stands between white space, with its punctuation; in scripts that put none between words (Chinese,
    Japanese, Thai) a character. What has no sound (a dash between spaces, emoji) belongs to the word before it, or to
    the first one.
    """
    found: list[tuple[int, int]] = []
    silent: int | None = None  # where the text begins, if that has no sound
    for start, end in _chunks(text):
        if speakable(text[start:end]):
            found.append((start if silent is None else silent, end))
            silent = None
        elif found:
            found[-1] = (found[-1][0], end)
        elif silent is None:
            silent = start
    return found


def _chunks(text: str) -> Iterator[tuple[int, int]]:
    for match in _CHUNK.finditer(text):
        start, last, opened = match.start(), "", False  # the last letter, and whether a bracket stands before the next
        for index in range(start, match.end()):
            char = text[index]
            opens = unicodedata.category(char) in ("Ps", "Pi")
            if not (opens or char.isalnum()):  # what belongs to the letter before it
                continue
            beside = UNSPACED.match(last) or UNSPACED.match(char)
            if last and beside and not opened and separable(text, index):
                yield start, index
                start = index
            last, opened = last if opens else char, opens
        yield start, match.end()


def letters(text: str) -> list[Letter]:
    """Letters and digits with their offsets: without case, accents and vowel signs, Korean syllables as their parts."""
    return [Letter(char, index, index + 1) for index, whole in enumerate(text) for char in folded(whole)]


def folded(text: str) -> str:
    """The letters and digits of ``text``, alike for all spellings of them that a tokenizer may choose."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(HAN if _HAN.match(char) else char for char in plain if char.isalnum())
