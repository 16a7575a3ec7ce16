"""How many speech tokens a text will take, before it is spoken, and better after some of it was.

The weights rest on how fast people read aloud. Trauzettel-Klosinski and Dietz 2012 (IReST, Invest. Ophthalmol. Vis.
Sci. 53) give characters a minute, white space not counted, for 17 languages; Brysbaert 2019 (J. Mem. Lang. 109) finds
183 words a minute over 77 studies of English where IReST's readers made 228. So a language's letter takes
``1500 / rate * 228 / 183`` tokens, 8 % of which is what punctuation adds (four tokens a comma, eight a full stop).
docs/long_text.md has the derivation and what is not known.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import deque
from itertools import accumulate
from statistics import median
from threading import Lock

from ..errors import InvalidRequestError
from .characters import clean, language_code

TOKENS_PER_SECOND = 25  # of the speech tokens that S3Tokenizer makes

_SHARE = 0.92 * 228 / 183 * 60 * TOKENS_PER_SECOND  # tokens a minute that letters take, over letters a minute
_RATES = {  # characters a minute, read aloud (IReST)
    "ar": 612, "nl": 978, "en": 987, "fi": 1078, "fr": 998, "de": 920, "he": 833, "it": 950, "pl": 916, "pt": 913,
    "ru": 986, "sl": 885, "es": 1025, "sv": 917, "tr": 1054,
}  # fmt: skip
_ALPHABET = _SHARE / 882  # 68 ms a character: IReST's mean over 14 alphabets
_SYLLABLE = _SHARE / 370  # IReST's mean of 370 syllables a minute
_HAN = _SHARE / 255
_KANA = _SHARE / 357 / 1.33  # IReST's Japanese is two thirds kana, and a kanji is two morae
# tokens for a letter of scripts without a rate of their own: syllables for the letter. Rough.
_LETTERS = (
    (0x0590, 0x05FF, _SHARE / 833),
    (0x0600, 0x08FF, _SHARE / 612),
    (0x0900, 0x0DFF, _SYLLABLE * 0.8),  # Devanagari to Sinhala: consonants with a vowel, some silent
    (0x0E00, 0x0EFF, _SYLLABLE * 0.5),  # Thai, Lao
    (0x0F00, 0x109F, _SYLLABLE * 0.8),  # Tibetan, Burmese
    (0x1100, 0x115F, _SYLLABLE),  # Korean in letters: the first of a syllable counts
    (0x1160, 0x11FF, 0.1),
    (0x1200, 0x137F, _SYLLABLE * 0.8),  # Ethiopic
    (0x1780, 0x17FF, _SYLLABLE * 0.6),  # Khmer
    (0x3040, 0x30FF, _KANA),
    (0xAC00, 0xD7AF, _SYLLABLE),
    (0xFF66, 0xFF9F, _KANA),
)
_HANS = ((0x2E80, 0x2FDF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_SMALL_KANA = frozenset("ぁぃぅぇぉゃゅょゎァィゥェォャュョヮ")
_COMMA, _CLAUSE, _SENTENCE, _UNKNOWN, _TAG = 4.0, 5.0, 8.0, 0.3, 15.0
_MARKS = {
    **dict.fromkeys(",،、，﹐､՝", _COMMA),
    **dict.fromkeys(";:؛；：—–…‥·", _CLAUSE),
    **dict.fromkeys(".!?。！？｡．؟۔।॥։።፧၊။។៕᙮", _SENTENCE),
    **dict.fromkeys("%‰€$£¥₹₽₩°", 2 * _SYLLABLE),
    **dict.fromkeys("&@+=#×÷±", _SYLLABLE),
}
_RUN = re.compile(r"[^\w\s]{2,}")  # several marks are one pause
_TAGS = re.compile(r"\[[^\[\]\n]{1,60}\]|<[^<>\n]{1,200}>")
_INSIDE = re.compile(r"(?<=\w)[.,:;](?=\w)")
_CAPITALS = re.compile(r"\b[A-Z]{2,4}\b")


class _Weights(dict):
    """Speech tokens for each character, made when it is first met."""

    def __init__(self, language: str):
        super().__init__(_MARKS)
        self.letter = _SHARE / _RATES[language] if language in _RATES else _ALPHABET
        # a digit is 1.8 syllables (345: three hundred forty-five), of Chinese and Japanese ones more characters
        self.digit = 1.8 * (_HAN if language in ("zh", "ja") else _SYLLABLE)
        self.han = 2 * _KANA if language == "ja" else _HAN

    def __missing__(self, character: str) -> float:
        weight = self[character] = self._weight(character)
        return weight

    def _weight(self, character: str) -> float:
        category, code = unicodedata.category(character), ord(character)
        if character.isspace():
            return 0.0
        if category[0] == "N":
            return self.digit
        if category == "Lm" or category[0] == "M" or character in _SMALL_KANA:
            return _KANA if character == "ー" else 0.1
        if category[0] != "L":
            return _UNKNOWN
        if any(low <= code <= high for low, high in _HANS):
            return self.han
        return next((weight for low, high, weight in _LETTERS if low <= code <= high), self.letter)


_TABLES: dict[str, _Weights] = {}


def token_weights(text: str, language: str) -> list[float]:
    """Speech tokens for each character of ``text``, which is clean already; the sum is the estimate."""
    table = _TABLES.get(language)
    if table is None:
        table = _TABLES.setdefault(language, _Weights(language))
    weights = [table[character] for character in text]
    for match in _INSIDE.finditer(text):  # 1,234: nothing; 3.14, example.com: a word
        spoken = match.group() == "."
        weights[match.start()] = _SYLLABLE if spoken else _UNKNOWN
    for match in _RUN.finditer(text):
        start, end = match.span()
        weights[start:end] = [max(weights[start:end])] + [_UNKNOWN] * (end - start - 1)
    if not text.isupper():
        for match in _CAPITALS.finditer(text):  # BBC: letter by letter
            weights[match.start() : match.end()] = [_SYLLABLE * 0.8] * len(match.group())
    for match in _TAGS.finditer(text):
        start, end = match.span()
        weights[start:end] = [_TAG] + [0.0] * (end - start - 1)
    return weights


def estimate_tokens(text: str, language: str | None = None) -> float:
    """Speech tokens that ``text`` will take, 25 a second, by a reader of average speed.

    IReST's readers of one language differ by 11 to 19 % (standard deviation), and a sentence from its reader's
    mean; where a model's voice lies among them nobody has measured here. ``Estimate`` follows one voice.
    """
    text = clean(text).text
    return sum(token_weights(text, language_code(language, text)))


class Estimate:
    """Speech tokens for texts, scaled by what a voice has needed so far. Threads may share one.

    The scale is the median of observed over predicted tokens of the last pieces, so that single runaways or dropped
    sentences do not move it; two pieces at the initial scale count with them.
    """

    def __init__(self, scale: float = 1.0, memory: int = 31):
        if not (math.isfinite(scale) and 0.1 <= scale <= 10):
            raise InvalidRequestError(f"The scale of an estimate is {scale!r}.", "It lies between 0.1 and 10.")
        self._initial, self._ratios = scale, deque(maxlen=memory)
        self._lock, self._scale = Lock(), scale

    @property
    def scale(self) -> float:
        """What predictions for an average reader are multiplied by; above 1 for a slow voice."""
        return self._scale

    @property
    def spread(self) -> float:
        """Relative error of one piece to reckon with, about one standard deviation: 0.35 until five were observed."""
        with self._lock:
            ratios = list(self._ratios)
        if len(ratios) < 5:
            return 0.35
        return max(0.05, 1.4826 * median(abs(ratio / self._scale - 1) for ratio in ratios))

    def tokens(self, text: str, language: str | None = None) -> float:
        """Speech tokens that ``text`` will take."""
        return self._scale * estimate_tokens(text, language)

    def cumulative(self, text: str, language: str) -> list[float]:
        """Speech tokens before each character of a clean ``text``, and at its end: ``len(text) + 1`` numbers."""
        scale = self._scale
        return list(accumulate((scale * weight for weight in token_weights(text, language)), initial=0.0))

    def observe(self, text: str, tokens: float, language: str | None = None) -> None:
        """Learn from a piece that took ``tokens`` to be spoken. Pieces under a second are not looked at."""
        predicted = estimate_tokens(text, language)
        if predicted < TOKENS_PER_SECOND or not (math.isfinite(tokens) and tokens > 0):
            return
        with self._lock:
            self._ratios.append(min(4.0, max(0.25, tokens / predicted)))
            self._scale = median([self._initial, self._initial, *self._ratios])
