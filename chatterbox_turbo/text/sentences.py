"""Where sentences end: by sentencex, or without it by a few rules over the full stops of all scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module

from ..errors import InvalidRequestError
from .characters import CJK, speakable

INSTALL = 'pip install "chatterbox-turbo[text]"'
WINDOW = 4000  # characters that sentences are looked for in at once: sentencex takes the square of it at its worst
BOUNDARIES = ("auto", "sentencex", "rules")

FULL_STOPS = ".!?…‼⁇⁈⁉。！？｡．؟۔।॥։።፧၊။៕᙮⸮"
CLOSERS = "\"'”’»›)]}」』）】》〉〕｣"
_END = re.compile(rf"[{re.escape(FULL_STOPS)}]+(?:[{re.escape(CLOSERS)}“]|[\u00a0\u202f]»)*")
_END_GREEK = re.compile(_END.pattern.replace("[", "[;\u037e", 1))
_ORDINALS = ("cs", "da", "de", "et", "fi", "hr", "hu", "lv", "no", "pl", "sk", "sl", "sr", "tr")  # 5. is fifth
_WIDE = frozenset("。！？｡．")  # no space follows these
_WORD_BEFORE = re.compile(r"([^\W\d_]+|\d+)\.$")
# shorter than a sentence can end with, where a capital follows; sentencex knows far more
_KNOWN = (
    "mr mrs ms dr prof rev hon gen col maj capt lt sgt gov sen rep pres st mt ft sr jr inc ltd co corp vol vols"
    " fig figs ch chap pp sec ed eds trans approx dept est vs etc cf jan feb mar apr jun jul aug sep sept oct nov dec"
    " hr fr nr bzw ca evtl ggf inkl vgl str tel zb dh usw mme mlle mgr av bd sig dott ing avv art pag sra srta dra"
    " ud uds núm pág dhr mevr drs ir ds bijv enz tzv np inż ul godz г гг ул им др пр стр тел"
)
_ABBREVIATIONS = frozenset(_KNOWN.split())
_BEFORE_NUMBERS = _ABBREVIATIONS | frozenset(
    ["no", "nos", "p", "s", "n", "num", "abb", "kap", "cap", "t", "rys", "rozdz", "рис", "гл"]
)

Segment = Callable[[str, str], list[str]]


@cache
def _sentencex() -> Segment | None:
    try:
        module = import_module("sentencex")
    except ImportError:
        return None
    return lambda language, text: list(module.segment(language, text))


def available() -> bool:
    """Is sentencex installed?"""
    return _sentencex() is not None


def _rules(language: str, text: str) -> list[str]:
    """Sentences of ``text`` by its full stops, but not after abbreviations, initials and numbers in a list."""
    parts, start = [], 0
    cased = not text.islower()
    for match in (_END_GREEK if language == "el" else _END).finditer(text):
        end = match.end()
        if end < len(text) and not text[end].isspace() and match.group()[0] not in _WIDE:
            continue
        while end < len(text) and text[end].isspace():
            end += 1
        if cased and text[end : end + 1].islower():
            continue
        if match.group() == "." and (word := _WORD_BEFORE.search(text, max(start, match.end() - 20), match.end())):
            name = word.group(1)
            inner = word.start() > start and text[word.start() - 1] == "."  # p.m., z.B.
            number = name.isdigit()
            if inner or name.lower() in _ABBREVIATIONS or (len(name) == 1 and not number):
                continue
            if number and len(name) < 3 and language in _ORDINALS:
                continue
        parts.append(text[start:end])
        start = end
    return parts + ([text[start:]] if start < len(text) else [])


def segmenter(boundaries: str) -> Segment:
    """What finds sentences: ``"sentencex"``, ``"rules"``, or ``"auto"``, which is sentencex where it is installed."""
    if boundaries not in BOUNDARIES:
        raise InvalidRequestError(f"boundaries is {boundaries!r}.", "", f"One of {', '.join(BOUNDARIES)}.")
    found = None if boundaries == "rules" else _sentencex()
    if found is None and boundaries == "sentencex":
        raise InvalidRequestError("Sentences cannot be found by sentencex:", "it is not installed.", f"Run: {INSTALL}")
    return found or _rules


def sentence_spans(text: str, language: str, segment: Segment) -> list[tuple[int, int]]:
    """Start and end of each sentence of a paragraph, without the white space around it, in order.

    Every other character lies in one of them. What has no sound (a closing quotation mark on its own) belongs to the
    sentence before it. Linear in the length of ``text``.
    """
    spans: list[tuple[int, int]] = []
    for start, end in _glued(text, language, segment):
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        if start == end:
            continue
        if spans and not (speakable(text[start:end]) and speakable(text[spans[-1][0] : spans[-1][1]])):
            start = spans.pop()[0]
        spans.append((start, end))
    return spans


def _glued(text: str, language: str, segment: Segment) -> Iterator[tuple[int, int]]:
    """Sentences as ``segment`` finds them, joined where it cut after an initial or within a number's name."""
    begin: int | None = None
    cased = not text.islower()  # else a small letter says nothing
    for start, end in _found(text, language, segment):
        begin = start if begin is None else begin
        if not _unfinished(text, begin, end, cased):
            yield begin, end
            begin = None
    if begin is not None:
        yield begin, len(text)


def _unfinished(text: str, start: int, end: int, cased: bool) -> bool:
    """Is a full stop before ``end`` that of an abbreviation: ``M. Dupont``, ``vol. 2``, ``3. maja``, ``p. so``?"""
    follows, cut = text[end : end + 1], end
    while end > start and text[end - 1].isspace():
        end -= 1
    if end == start or text[end - 1] != "." or not follows:
        return False
    if text[end - 2 : end - 1] == ".":  # an ellipsis
        return cased and follows.islower()
    if end == cut:  # U.S.A. among characters that need no space
        return True
    word = _WORD_BEFORE.search(text, max(start, end - 20), end)
    if word is None or end - word.start() == 20:
        return False
    if cased and follows.islower():
        return True
    name = word.group(1)
    if name.isdigit():
        return False
    return (len(name) == 1 and name not in "I") or (
        follows.isdigit() and len(name) <= 4 and name.lower() in _BEFORE_NUMBERS
    )


def _found(text: str, language: str, segment: Segment) -> Iterator[tuple[int, int]]:
    """Sentences of one window after another; the last of a window is looked at again with what follows."""
    start = begin = 0  # of the window, of the sentence
    while start < len(text):
        window = text[start : start + WINDOW]
        ends = list(_ends(window, segment(language, window)))
        if start + len(window) < len(text):
            del ends[-1:]
        for end in ends:
            yield begin, start + end
            begin = start + end
        start = begin if ends else start + _last_break(window)  # a sentence longer than a window goes on


def _ends(window: str, parts: list[str]) -> Iterator[int]:
    """Where each of ``parts`` ends, white space after it included; versions differ in whether they give it back."""
    at = 0
    for part in parts:
        if not (core := part.strip()):
            continue
        found = window.find(core, at)
        if found < 0:
            continue
        at = found + len(core)
        while at < len(window) and window[at].isspace():
            at += 1
        yield at
    if at < len(window) or not parts:
        yield len(window)


_BREAK = re.compile(rf"\s+(?=\S*\Z)|(?<=[{CJK}])(?=[^{CJK}]*\Z)")


def _last_break(window: str) -> int:
    """Where the last word begins in a window that has no end of a sentence."""
    tail = max(0, len(window) - 400)
    found = _BREAK.search(window, tail)
    return found.end() if found else len(window)
