"""Characters: which are never spoken, where a user-perceived one ends, and which script a text is written in."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass

from ..errors import InvalidRequestError

# no white space, no sound: controls, marks of direction, soft hyphen, zero-width characters, byte order marks, halves
# of surrogate pairs, noncharacters, tags
_SILENT = (
    r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    r"\u202a-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    r"\U000e0000-\U000e0fff"
)
# zero-width joiner and non-joiner are spelling in these scripts, and glue between emoji
_JOINED = r"\u0600-\u0dff\u0f00-\u0fff\u1000-\u109f\u1780-\u18aa\u2190-\u2bff\ufe0f\U0001f000-\U0001faff"
_REMOVED = re.compile(rf"[{_SILENT}]|(?<![{_JOINED}])[\u200c\u200d]")
ZERO_WIDTH_SPACE = "\u200b"

CJK = (
    r"\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u303b\u303c\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf"
    r"\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
SYLLABIC = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"  # Thai to Khmer
)
UNSPACED = re.compile(rf"[{CJK}{SYLLABIC}]")

# scripts whose language is clear enough without being told; the first that has a third of the letters
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff\uff66-\uff9f]"), 0.1),
    ("zh", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"), 0.3),
    ("ko", re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]"), 0.3),
    ("ru", re.compile(r"[\u0400-\u04ff]"), 0.3),
    ("ar", re.compile(r"[\u0600-\u06ff\u0750-\u077f]"), 0.3),
    ("he", re.compile(r"[\u0590-\u05ff]"), 0.3),
    ("hi", re.compile(r"[\u0900-\u097f]"), 0.3),
    ("el", re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]"), 0.3),
    ("th", re.compile(r"[\u0e00-\u0e7f]"), 0.3),
)
_SAMPLE = 2000  # characters that a language is guessed from
_SPEAKABLE = re.compile(r"[^\W_]")


def plain(text: object, what: str = "The text") -> str:
    """``text`` as a plain ``str``; ``InvalidRequestError`` for anything that is none, bytes above all."""
    if isinstance(text, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(f"{what} is {type(text).__name__}.", "", 'Decode it: text.decode("utf-8").')
    if not isinstance(text, str):
        raise InvalidRequestError(f"{what} is {type(text).__name__}, not str.")
    return str.__str__(text)


def language_code(language: str | None, text: str = "") -> str:
    """``"pt"`` of ``"pt-BR"``; where no language is told, a guess from the script of ``text``, ``"en"`` for Latin."""
    if language is None:
        sample = text[:_SAMPLE]
        letters = max(1, len(_SPEAKABLE.findall(sample)))
        return next((code for code, own, share in _SCRIPTS if len(own.findall(sample)) >= share * letters), "en")
    if not isinstance(language, str):
        raise InvalidRequestError(f"The language is {type(language).__name__}, not str.", "", 'Say "en", "zh", ...')
    return re.split(r"[-_]", language.strip().lower(), maxsplit=1)[0] or "en"


def speakable(text: str) -> bool:
    """Is there a letter or a digit? Emoji, punctuation and ornaments have no sound."""
    return _SPEAKABLE.search(text) is not None


@dataclass(frozen=True)
class Cleaned:
    """A text without the characters that are never spoken, and where its characters were.

    Attributes:
        text: what is left.
        removed: for each character that went, in order, the index in ``text`` of the one that follows it.
        breaks: indices in ``text`` before which there was a zero-width space, which marks words in Thai and Khmer.
    """

    text: str
    removed: tuple[int, ...] = ()
    breaks: frozenset[int] = frozenset()

    def original(self, index: int) -> int:
        """Where the character at ``index`` was before."""
        return index + bisect_right(self.removed, index)


def clean(text: str) -> Cleaned:
    """Without controls, marks of direction, zero-width characters and halves of surrogate pairs; white space stays."""
    found = list(_REMOVED.finditer(text))
    if not found:
        return Cleaned(text)
    removed = tuple(match.start() - count for count, match in enumerate(found))
    breaks = frozenset(at for at, match in zip(removed, found, strict=True) if match.group() == ZERO_WIDTH_SPACE)
    return Cleaned(_REMOVED.sub("", text), removed, breaks)


_VOWELS_BEFORE = frozenset(
    "\u0e40\u0e41\u0e42\u0e43\u0e44\u0ec0\u0ec1\u0ec2\u0ec3\u0ec4"
)  # written before their consonant
_VOWELS_AFTER = frozenset("\u0e30\u0e32\u0e33\u0e45\u0e46\u0e2f\u0eb0\u0eb2\u0eb3\u0ec6")
_VIRAMA = frozenset("\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca\u1039\u17d2")
_JOINER = "\u200d"


def starts_syllable(text: str, index: int) -> bool:
    """Is it a Thai or Lao vowel that is written first in its syllable? A cut before it is inside no syllable."""
    return text[index] in _VOWELS_BEFORE


def separable(text: str, index: int) -> bool:
    """May ``text`` be cut before ``index`` without breaking a user-perceived character?

    After Unicode's extended grapheme clusters (UAX 29), and stricter: Thai and Lao vowels stay with their consonant.
    """
    if not 0 < index < len(text):
        return True
    before, after = text[index - 1], text[index]
    if after < "\u0300":
        return before not in _VOWELS_BEFORE
    if unicodedata.category(after)[0] == "M" or after in _VOWELS_AFTER or after in "\u200c\u200d":
        return False
    if before in _VOWELS_BEFORE or before == _JOINER or before in _VIRAMA:
        return False
    if "\U0001f3fb" <= after <= "\U0001f3ff":  # skin tones
        return False
    if "\U0001f1e6" <= after <= "\U0001f1ff" and "\U0001f1e6" <= before <= "\U0001f1ff":  # flags are pairs
        first = index
        while first and "\U0001f1e6" <= text[first - 1] <= "\U0001f1ff" and index - first < 64:
            first -= 1
        return (index - first) % 2 == 0
    return not ("\u1160" <= after <= "\u11ff" and "\u1100" <= before <= "\u11ff")  # Korean letters of one syllable
