"""Lines of a text, read one after another, as paragraphs and headings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .characters import CJK, plain
from .sentences import CLOSERS, FULL_STOPS

BLOCK = 20_000  # characters without an empty line that are held at most before paragraphs are looked for in them
_WIDTH, _WIDTH_CJK = 40, 15  # shorter lines are not wrapped, they end where their author wanted it
_LINES = re.compile(r"\r\n|[\n\r\v\f\x85\u2028\u2029]")
_PAGE = ("\f", "\u2029")

_NUMBER = (
    r"(?:\d{1,4}|[IVXLCDM]{1,8}|[ivxlcdm]{1,8}|the\s+\w+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:[- ]\w+)?)"
)
_NAMES = (
    r"chapter|book|part|kapitel|chapitre|capítulo|capitulo|capitolo|hoofdstuk|rozdział|глава|часть|kapittel|luku|bölüm"
    r"|κεφάλαιο|अध्याय|الفصل|فصل|פרק|บทที่|sura|bab"
)
_CHAPTER = re.compile(
    rf"(?:{_NAMES})\s+{_NUMBER}\b(?P<title>.{{0,80}})$"
    r"|(?:الفصل|פרק|अध्याय)\s+\S+.{0,60}$"
    r"|第\s?[0-9０-９一二三四五六七八九十百千〇零两]{1,8}\s?[章回節节部卷話话](?:\s.{0,40})?$"
    r"|제\s?\d{1,4}\s?[장부](?:\s.{0,40})?$"
    r"|(?:prologue|epilogue|foreword|preface|afterword|prolog|epilog|vorwort|nachwort|prólogo|epílogo|prologo|epilogo"
    r"|avant-propos|пролог|эпилог|предисловие|序章|終章|尾声)[.:]?$",
    re.IGNORECASE,
)
_TITLE = re.compile(r"\s*[.:—–-]|\s+(?![a-zа-я])")  # what a chapter's number is followed by, if not by nothing
_MARKDOWN = re.compile(r"(#{1,6})\s+(?=\S)")
_LEAD = re.compile(r"[\s\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]*")  # a byte order mark, marks of direction
_BULLET = re.compile(_LEAD.pattern + r"[-*+•‣◦▪–—]\s+(?=\S)")
_ITEM = re.compile(r"\s*(?:[-*+•‣◦▪]|\d{1,3}[.)])\s")
_UNDERLINE = re.compile(r"\s*(?:={3,}|-{3,})\s*$")
_LEADER = re.compile(r"\.{4,}|…{2,}|\t\s*\d+$")  # a line of a table of contents
_WORD = re.compile(rf"[{CJK}]|\S+")
_ENDS = re.compile(rf"[{re.escape(FULL_STOPS)}:：][{re.escape(CLOSERS)}]*$")


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, a line that its author ended, or a heading.

    Attributes:
        text: as it stands in the text, line ends included.
        start: its offset in the text.
        level: 0, or that of a heading: 1 and 2 begin a chapter.
        continues: it is another line of the paragraph before it, in a poem or a list.
        marker: how many characters at its beginning are not spoken (``## ``, ``- ``, the dash of a dialogue).
    """

    text: str
    start: int
    level: int = 0
    continues: bool = False
    marker: int = 0


def heading(line: str) -> tuple[int, int]:
    """Level of the heading that a line is, 0 if it is none, and how many characters of it mark it as one."""
    lead = _LEAD.match(line)
    stripped = line[lead.end() :].strip() if lead else ""
    if not stripped or len(stripped) > 120 or _LEADER.search(stripped):
        return 0, 0
    marked = _MARKDOWN.match(stripped)
    if marked:
        return len(marked.group(1)), lead.end() + marked.end()
    found = _CHAPTER.match(stripped)
    title = (found and found.group("title")) or ""
    sentence = title.endswith((".", "!", "?", ",", ";")) and len(title) > 1 and not title.isupper()
    return int(found is not None and not sentence and (not title or _TITLE.match(title) is not None)), 0


def _wide(line: str) -> bool:
    return re.search(rf"[{CJK}]", line) is not None


def _wrapped(line: str, following: str, width: int) -> bool:
    """Was ``line`` broken because the first word of ``following`` did not fit, or where its author wanted it to end?"""
    word = _WORD.match(following.lstrip())
    if _ITEM.match(following):
        return False
    if width < (_WIDTH_CJK if _wide(line) else _WIDTH) or word is None:
        return False
    return len(line.rstrip()) + 1 + len(word.group()) > 0.85 * width


def _block(lines: list[tuple[int, str]]) -> Iterator[Paragraph]:
    """Paragraphs of lines without an empty one between them."""
    width = max(len(line.rstrip()) for _, line in lines)
    held: list[tuple[int, str]] = []
    continues = False

    def joined() -> Paragraph:
        text = "".join(line for _, line in held)
        bullet = _BULLET.match(text)
        return Paragraph(text, held[0][0], 0, continues, bullet.end() if bullet else 0)

    for index, (start, line) in enumerate(lines):
        following = lines[index + 1][1] if index + 1 < len(lines) else ""
        level, marker = heading(line)
        if not level and not held and _UNDERLINE.match(following) and len(line.strip()) <= 120:
            level = 1 if "=" in following else 2
        if level:
            if held:
                yield joined()
            yield Paragraph(line, start, level, False, marker)
            held, continues = [], False
            continue
        held.append((start, line))
        if following and _wrapped(line, following, width) and not heading(following)[0]:
            continue
        yield joined()
        held, continues = [], not _ENDS.search(line.rstrip())
    if held:
        yield joined()


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """Lines with their ends, of parts that may hold several lines or the half of one."""
    rest: list[str] = []
    for part in parts:
        part = plain(part, "A line of the text")
        begin = 0
        for match in _LINES.finditer(part):
            rest.append(part[begin : match.end()])
            yield "".join(rest)
            rest, begin = [], match.end()
        if begin < len(part):
            rest.append(part[begin:])
    if rest:
        yield "".join(rest)


def paragraphs(parts: Iterable[str]) -> Iterator[Paragraph]:
    """Paragraphs and headings of a text that comes in parts: the lines of a file, or one string.

    Held at once: one paragraph, or ``BLOCK`` characters where no empty line comes. Line ends are those of all systems.
    """
    held: list[tuple[int, str]] = []
    start = size = 0
    for line in _lines(parts):
        if line.strip():
            held.append((start, line))
            size += len(line)
        start += len(line)
        if held and (not line.strip() or line.endswith(_PAGE)):
            yield from _block(held)
            held, size = [], 0
        elif size > BLOCK:
            found = list(_block(held))
            if len(found) > 1:  # the last one may go on
                yield from found[:-1]
                held = [one for one in held if one[0] >= found[-1].start]
            else:
                yield from found
                held = []
            size = sum(len(line) for _, line in held)
    if held:
        yield from _block(held)
