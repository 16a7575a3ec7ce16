"""From a text, or the lines of a book, to pieces of about a target length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .characters import CJK, clean, language_code, plain, speakable
from .cutting import parts
from .estimate import TOKENS_PER_SECOND, Estimate
from .normalization import check_library, normalized
from .options import Splitting, chosen
from .paragraphs import Paragraph, paragraphs
from .pieces import Boundary, Piece, Span
from .sentences import CLOSERS, FULL_STOPS, Segment, segmenter, sentence_spans

_WRAP = re.compile(rf"(?<=[{CJK}、。，；：！？」』）])[ \t]*[\r\n]+[ \t\u3000]*(?=[{CJK}「『（])")
_BREAKS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")
_UNSPACED_END = re.compile(rf"[{CJK}、。，；：！？」』）]\Z")
_TOUCHING = re.compile(r"\S*")
_COMMAS, _CLAUSES = ",،、，﹐､՝)]）", ";:؛；：—–…·"


@dataclass(frozen=True)
class _Unit:
    """A sentence, or a part of one that is too long, in a clean paragraph."""

    start: int
    end: int
    sentence: int
    tokens: float
    forced: bool
    boundary: Boundary


@dataclass
class _Draft:
    """A piece whose end is not decided yet."""

    text: str
    start: int
    end: int
    spans: list[Span]
    paragraph: int
    chapter: int
    heading: bool
    forced: bool
    boundary: Boundary  # what it ends at, if no heading or end of the text follows
    continues: bool  # it begins with a further line of its paragraph

    @property
    def tokens(self) -> float:
        return sum(span.tokens for span in self.spans)


def split(
    text: str,
    language: str | None = None,
    *,
    splitting: Splitting | None = None,
    estimate: Estimate | None = None,
    **changes: object,
) -> list[Piece]:
    """Cut ``text``, of any length, into pieces that are spoken one by one.

    Args:
        text: anything; no piece comes of one that has nothing to speak (empty, white space, emoji).
        language: ``"en"``, ``"pt-BR"``, ...; by default that of the script, paragraph by paragraph.
        splitting: how; ``changes`` are options of it: ``split(text, target=8, longest=12)``.
        estimate: what has been learnt about the voice's speed.

    Raises:
        InvalidRequestError: the text is no ``str``, an option is out of range, num2words is missing for ``normalize``.

    Warns:
        NumbersKeptWarning: ``normalize`` has no rules for the language of a text with numbers, which stay.
    """
    return list(pieces([plain(text)], language, splitting=splitting, estimate=estimate, **changes))


def pieces(
    lines: Iterable[str],
    language: str | None = None,
    *,
    splitting: Splitting | None = None,
    estimate: Estimate | None = None,
    **changes: object,
) -> Iterator[Piece]:
    """As ``split``, of a text that comes in parts (an open file), piece by piece: a paragraph is held at a time.

    Offsets count from the first part. ``estimate`` is asked anew for each paragraph, so that pieces follow what
    ``observe`` has been told meanwhile. Options are checked at the call, not at the first piece.
    """
    options = chosen(splitting, changes)
    if isinstance(lines, (str, bytes, bytearray)):
        lines = [plain(lines)]
    language = None if language is None else language_code(language)
    if options.normalize:
        check_library()
    return _Reader(language, options, estimate or Estimate()).read(lines)


class _Reader:
    """Where in a text the reading is: numbers of sentence, paragraph and chapter, and the piece that may still grow."""

    def __init__(self, language: str | None, options: Splitting, estimate: Estimate):
        self.language, self.options, self.estimate = language, options, estimate
        self.segment: Segment = segmenter(options.boundaries)
        self.target, self.longest, self.shortest = (
            seconds * TOKENS_PER_SECOND for seconds in (options.target, options.longest, options.shortest)
        )
        self.sentence = self.chapter = 0
        self.paragraph = -1
        self.held: _Draft | None = None
        self.interrupted = False  # by an ornament between paragraphs
        self.unspoken: int | None = None  # where the text begins, if it begins with what is never spoken

    def read(self, lines: Iterable[str]) -> Iterator[Piece]:
        for paragraph in paragraphs(lines):
            for draft in self._drafts(paragraph):
                if self.held is not None and self._belongs(self.held, draft):
                    _join(self.held, draft)
                    continue
                if self.held is not None:
                    yield self._finished(self.held, draft)
                self.held, self.interrupted = draft, False
        if self.held is not None:
            yield self._finished(self.held, None)

    def _belongs(self, held: _Draft, draft: _Draft) -> bool:
        """Is ``draft``, or what is held, too short to be spoken on its own?"""
        if held.heading or draft.heading or self.interrupted:
            return False
        return min(held.tokens, draft.tokens) < self.shortest and held.tokens + draft.tokens <= self.longest

    def _finished(self, held: _Draft, following: _Draft | None) -> Piece:
        boundary = self._boundary(held, following)
        return Piece(
            text=held.text,
            start=held.start,
            end=held.end,
            pause=0.0 if boundary == "end" else float(self.options.pauses[boundary]),
            boundary=boundary,
            tokens=held.tokens,
            spans=tuple(held.spans),
            paragraph=held.paragraph,
            chapter=held.chapter,
            heading=held.heading,
            forced=held.forced,
        )

    def _boundary(self, held: _Draft, following: _Draft | None) -> Boundary:
        if following is None:
            return "end"
        if held.boundary == "paragraph":
            if held.heading or following.heading or self.interrupted:
                return "chapter"
            if following.continues:
                return "sentence"
        return held.boundary

    def _drafts(self, paragraph: Paragraph) -> Iterator[_Draft]:
        """Pieces of a paragraph, of about the target length."""
        raw, base = paragraph.text, paragraph.start
        begin = len(raw) - len(raw.lstrip())
        cleaned = clean(raw[paragraph.marker :])
        text = _BREAKS.sub(" ", cleaned.text)
        if not speakable(text):
            if self.held is not None:
                self.held.end = base + len(raw.rstrip())
            elif self.unspoken is None:
                self.unspoken = base + begin
            self.interrupted = self.interrupted or bool(text.strip())
            return
        self.paragraph += not paragraph.continues
        self.chapter += paragraph.level in (1, 2)
        language = self.language or language_code(None, text)
        before = self.estimate.cumulative(text, language)

        def original(index: int) -> int:
            return base + paragraph.marker + cleaned.original(index)

        units = list(self._units(text, language, before, cleaned.breaks))
        start, self.unspoken = base + begin if self.unspoken is None else self.unspoken, None
        at = 0
        for group in self._groups(units):
            at += len(group)
            following = original(units[at].start) - base if at < len(units) else len(raw)
            end, after = _ends(raw, original(group[-1].end - 1) + 1 - base, following)
            spans = [
                Span(one.sentence, original(one.start), original(one.end - 1) + 1, before[one.end] - before[one.start])
                for one in group
            ]
            yield _Draft(
                text=self._spoken(cleaned.text[group[0].start : group[-1].end], language),
                start=start,
                end=base + end,
                spans=spans,
                paragraph=self.paragraph,
                chapter=self.chapter,
                heading=paragraph.level > 0,
                forced=group[-1].forced,
                boundary=group[-1].boundary if at < len(units) else "paragraph",
                continues=paragraph.continues and start == base + begin,
            )
            start = base + after

    def _units(self, text: str, language: str, before: list[float], breaks: frozenset[int]) -> Iterator[_Unit]:
        """Sentences, and the parts of those that are too long, of what has a sound."""
        for start, end in sentence_spans(text, language, self.segment):
            for first, last, forced in parts(text, (start, end), language, before, self.longest, breaks):
                stop = first + len(text[first:last].rstrip())
                if speakable(text[first:stop]):  # else a thousand dashes
                    yield _Unit(first, stop, self.sentence, before[stop] - before[first], forced, _mark(text, stop))
            self.sentence += 1

    def _groups(self, units: list[_Unit]) -> Iterator[list[_Unit]]:
        """Units together, as near to the target as they come and never above the longest."""
        group: list[_Unit] = []
        size = 0.0
        for unit in units:
            total = size + unit.tokens
            if group and (total > self.longest or size >= self.target or total - self.target > self.target - size):
                yield group
                group, total = [], unit.tokens
            group, size = [*group, unit], total
        yield group

    def _spoken(self, text: str, language: str) -> str:
        """As it is spoken: lines that were wrapped joined, white space run together, numbers as words if wanted."""
        text = " ".join(_WRAP.sub("", text).split())
        return normalized(text, language) if self.options.normalize else text


def _ends(raw: str, end: int, following: int) -> tuple[int, int]:
    """Where a piece ends, and the next one begins: what is never spoken between them belongs to the one it touches."""
    if following == len(raw):
        return len(raw.rstrip()), following
    touched = _TOUCHING.match(raw, end, following)
    end = touched.end() if touched else end
    between = raw[end:following]
    return end, following - len(between.lstrip())


def _join(held: _Draft, draft: _Draft) -> None:
    unspaced = _UNSPACED_END.search(held.text) is not None
    if held.boundary == "paragraph" and held.text[-1].isalnum():  # a line without a full stop
        held.text += "。" if unspaced else "."
    held.text += ("" if unspaced else " ") + draft.text
    held.spans += draft.spans
    held.end, held.boundary, held.forced = draft.end, draft.boundary, draft.forced


def _mark(text: str, end: int) -> Boundary:
    """The boundary that the last character before ``end`` makes, inside a sentence or after it."""
    last = end - 1
    while last > 0 and text[last] in CLOSERS and text[last] not in ")]）":
        last -= 1
    if text[last] in FULL_STOPS and text[last] != "…":
        return "sentence"
    if text[last] in _CLAUSES or text[last - 1 : last + 1] == "--":
        return "clause"
    return "comma" if text[last] in _COMMAS else "word"
