"""When each word and sentence of an utterance is heard.

Where the model's family has heads that attend to the text as it is spoken, words have their times from these: attention
to a way through the text (``runtime.t3.alignment_path``), text tokens to the letters that they spell
(``upstream.text_tokens``), letters to words. Otherwise sentences have their shares of the speech, by the estimate of
their lengths (``text.estimate``), and words none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from ..runtime.t3.alignment_path import boundaries
from ..text import Piece, estimate_tokens, split
from ..text.words import HAN, UNKNOWN, Letter, letters, words
from ..upstream.flow_inputs import TOKEN_SAMPLES
from ..upstream.text_tokens import spelled
from .utterance import Utterance

Source = Literal["alignment", "estimate"]
TRUSTED = 2  # letters in a row that must agree, where text and tokens differ
EACH, WHOLE = 0.5, 3600.0  # seconds: sentences are neither put together nor cut


class Times(NamedTuple):
    """Of a word of ``text.words``, in seconds from the beginning of its utterance."""

    start: float
    end: float
    source: Source


@dataclass(frozen=True)
class Word:
    """A word, with the punctuation that it is written with.

    Attributes:
        start, end: seconds from the beginning of the audio, ``start <= end``. Words that were never spoken, because
            speech was cut, begin and end where it does.
        source: ``"alignment"``: read from the model's attention; ``"estimate"``: a share of the time between words
            whose times were, by its length: what was spoken is written otherwise (Japanese kanji).
    """

    text: str
    start: float
    end: float
    source: Source


@dataclass(frozen=True)
class Sentence:
    """A sentence, or a part of one: from its first word to its last one.

    Attributes:
        start, end: seconds from the beginning of the audio.
        source: as that of ``Word``; ``"estimate"`` also where there are no words.
        words: none where the family of the model has no alignment.
    """

    text: str
    start: float
    end: float
    source: Source = "estimate"
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class TimedSpeech:
    """Speech, and when each part of it is heard.

    Attributes:
        samples: (1, m) float32 on the host, as ``generate`` gives them.
        sentences: in order, from 0 to m / rate at most.
        rate: samples a second.
    """

    samples: Tensor
    sentences: tuple[Sentence, ...]
    rate: int

    @property
    def words(self) -> tuple[Word, ...]:
        """All words, in order; none where the family of the model has no alignment."""
        return tuple(word for sentence in self.sentences for word in sentence.words)


def times_of(utterance: Utterance, count: int, rate: int) -> list[Times] | None:
    """Those of the words of an utterance that was spoken in ``count`` samples; ``None`` without attention.

    Args:
        utterance: with ``attention`` and ``spelling``.
    """
    if utterance.attention is None:
        return None
    text, language = utterance.given["text"], utterance.given.get("language_id")
    found = spelled(utterance.spelling, language)
    edges = np.minimum(boundaries(utterance.attention.cpu().numpy()) * TOKEN_SAMPLES, count) / rate
    return word_times(text, found, edges, language)


def word_times(text: str, found: Sequence[Letter], edges: np.ndarray, language: str | None = None) -> list[Times]:
    """Times of ``words(text)``.

    Args:
        found: the letters that the text tokens spell, by numbers of tokens.
        edges: (S + 1,) seconds at which each text token begins, and the last one ends; never decreasing.
    """
    spans, written = words(text), letters(text)
    own, offsets = matched(written, found), [one.start for one in written]

    def second(token: float) -> float:
        return float(np.interp(token, np.arange(len(edges)), edges))

    first, last = (second(found[0].start), second(found[-1].end)) if found else (float(edges[0]), float(edges[-1]))
    known: list[Times | None] = []
    for start, end in spans:
        those = own[bisect_left(offsets, start) : bisect_left(offsets, end)]
        sure = those and those[0] is not None and those[-1] is not None
        known.append(Times(second(those[0].start), second(those[-1].end), "alignment") if sure else None)
    sizes = [max(1.0, estimate_tokens(text[start:end], language)) for start, end in spans]
    return _filled(known, sizes, first, last)


def _filled(known: list[Times | None], sizes: Sequence[float], first: float, last: float) -> list[Times]:
    """What is missing has its share of the time between its neighbours, or between them and the ends."""
    result: list[Times] = []
    at = 0
    while at < len(known):
        if known[at] is not None:
            result.append(known[at])
            at += 1
            continue
        stop = next((n for n in range(at, len(known)) if known[n] is not None), len(known))
        begin = result[-1].end if result else first
        end = max(begin, known[stop].start if stop < len(known) else last)
        shares = np.concatenate([[0.0], np.cumsum(sizes[at:stop])])
        shares /= shares[-1]
        edges = (1.0 - shares) * begin + shares * end
        result += [Times(*map(float, both), "estimate") for both in pairwise(edges)]
        at = stop
    return result


def matched(written: Sequence[Letter], found: Sequence[Letter]) -> list[Letter | None]:
    """For each letter of a text the one that a tokenizer has made of it, where that is certain."""
    if len(written) == len(found) and all(
        one.char == other.char or other.char == UNKNOWN for one, other in zip(written, found, strict=True)
    ):
        return list(found)
    # a Chinese character could be any other one, once their numbers differ
    ours = [None if one.char == HAN else one.char for one in written]
    theirs = [one.char for one in found]
    result: list[Letter | None] = [None] * len(written)
    for start, other, size in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        if size >= TRUSTED:
            result[start : start + size] = found[other : other + size]
    return result


def sentences(
    pieces: Iterable[Mapping[str, Any]],
    rate: int,
    language: str | None = None,
    target: float = EACH,
    longest: float = WHOLE,
) -> Iterator[Sentence]:
    """The sentences of pieces that follow each other.

    Args:
        pieces: each with ``text``, ``samples`` (with the pause behind it), ``pause`` in seconds, and ``words``: the
            times of its words (``Times``) in the piece, or ``None``.
        rate: samples a second.
        target, longest: seconds that sentences are put together to, and that they are cut at.
    """
    at = 0.0
    for piece in pieces:
        length = piece["samples"] / rate
        lines = split(piece["text"], language, target=target, longest=longest, shortest=0.0)
        times = piece.get("words")
        if times is None or not lines:
            yield from _shared(lines, at, max(0.0, length - piece["pause"]))
        else:
            yield from _aligned(piece["text"], lines, times, at)
        at += length


def _shared(lines: Sequence[Piece], at: float, speech: float) -> Iterator[Sentence]:
    total = sum(line.tokens for line in lines)
    for line in lines:
        end = at + speech * line.tokens / total
        yield Sentence(line.text, at, end)
        at = end


def _aligned(text: str, lines: Sequence[Piece], times: Sequence[Times], at: float) -> Iterator[Sentence]:
    spans = words(text)
    found = [
        Word(text[first:last], at + one.start, at + one.end, one.source)
        for (first, last), one in zip(spans, map(Times._make, times), strict=True)
    ]
    offsets = [first for first, _ in spans]
    edges = [0, *(bisect_left(offsets, line.end) for line in lines[:-1]), len(found)]
    groups: list[tuple[str, int, int]] = []
    for line, (first, last) in zip(lines, pairwise(edges), strict=True):
        if first == last and groups:  # a part of the word before it, which is longer than a line
            groups[-1] = (groups[-1][0] + line.text, *groups[-1][1:])
        else:
            groups.append((line.text, first, last))
    for said, first, last in groups:
        own = tuple(found[first:last])
        sure = own[0].source == own[-1].source == "alignment"
        yield Sentence(said, own[0].start, own[-1].end, "alignment" if sure else "estimate", own)
