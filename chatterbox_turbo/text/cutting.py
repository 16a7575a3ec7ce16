"""A sentence that is too long for one piece: the best places to cut it, into parts of similar length."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from .characters import CJK, SYLLABIC, UNSPACED, separable, starts_syllable
from .sentences import CLOSERS, FULL_STOPS

# what a cut costs, in lengths of a part: one at a comma may lie a tenth further from the middle than one at a semicolon
SENTENCE, CLAUSE, COMMA, CONJUNCTION, SPACE, TITLE, SYLLABLE, CHARACTER = 0.0, 0.02, 0.1, 0.3, 0.45, 0.9, 1.2, 1.5
FORCED = SYLLABLE  # from here on a cut may lie inside a word

_CLAUSES = ";:؛；：—–‥·"
_COMMAS = ",،、，﹐､՝"
_OPENERS = "\"'“‘«‹([{「『（【《〈〔"
_CONJUNCTIONS = {
    "en": "and or but nor because which who that when while where if so then although though as than until unless",
    "de": "und oder aber denn sondern dass weil wenn als ob obwohl während damit bis",
    "fr": "et ou mais donc car que qui quand lorsque parce puisque si comme dont où",
    "es": "y e o u pero sino porque que cuando si como aunque donde mientras",
    "it": "e ed o ma però perché che quando se come mentre dove anche",
    "pt": "e ou mas porque que quando se como embora onde enquanto",
    "nl": "en of maar want omdat dat die als wanneer terwijl hoewel zodat",
    "ru": "и или но а что чтобы потому когда если как который где",
    "pl": "i oraz lub ale że żeby ponieważ gdy kiedy jeśli jak który gdzie",
    "sv": "och eller men att som när om eftersom medan där",
    "da": "og eller men at som når hvis fordi mens hvor",
    "no": "og eller men at som når hvis fordi mens hvor",
    "fi": "ja tai mutta että koska kun jos joka vaikka",
    "tr": "ve veya ama fakat çünkü ki ile ancak",
}
_WORDS = {language: frozenset(words.split()) for language, words in _CONJUNCTIONS.items()}

# not cut although white space or a script without spaces is in it: tags; addresses; 1 234 567; amounts with their unit
_WHOLE = re.compile(
    r"\[[^\[\]\n]{1,60}\]|<[^<>\n]{1,200}>"
    rf"|(?:https?://|www\.)[^\s<>\"、。，；：！？」』）】》{CJK}{SYLLABIC}]+"
    r"|(?<!\d)\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)"
    r"|\d\s(?:[%‰€$£¥₽]|°\s?[CF]?|(?:[ap]\.?\s?m|[kcm]?m|[km]?g|m?l|h|min|Uhr|Mio|Mrd)(?![A-Za-z]))"
    r"|[$€£¥]\s\d"
)
_GAP = re.compile(r"\s+")
_DASHED = re.compile(r"(?<=\w)(?:—|--)(?=\w)")
_NO_BREAK = frozenset("\u00a0\u2007\u202f")
_ABBREVIATED = re.compile(r"(?<![^\W_])(?:[^\W\d_]|[^\W\d_]{1,5}\.[\w.]{0,8}|[^\W\d_]{2,5})\.$")
_NEXT_WORD = re.compile(r"[^\W_]+")
# Japanese and Chinese: what no line begins with, and no line ends with
_NEVER_FIRST = frozenset(
    "々ゝゞーぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ。、，．！？：；」』）】》〉〕”’…‥・%％℃円元年月日時分秒"
)
_NEVER_LAST = frozenset("「『（【《〈〔“‘$￥第")
_UNSPACED_NEAR = re.compile(
    rf"(?<=[{CJK}{SYLLABIC}、。，；：！？」』）】》])(?=\S)|(?<=\S)(?=[{CJK}{SYLLABIC}「『（【《])"
)


@dataclass(frozen=True)
class Cut:
    """A place to cut: the index of the character that the next part begins with, and what it costs."""

    at: int
    cost: float


def _rank(text: str, end: int, start: int, language: str, cased: bool) -> float:
    """Cost of a cut at white space: ``end`` is after the last character before it, ``start`` the first one after it."""
    last = end - 1
    while last > 0 and text[last] in CLOSERS and text[last] not in "'’":
        last -= 1
    mark = text[last]
    if mark in FULL_STOPS:
        if mark != ".":
            return SENTENCE
        follows = text[start]
        short = _ABBREVIATED.search(text, max(0, last - 15), last + 1)
        return TITLE if short or (cased and follows.islower()) or follows.isdigit() else SENTENCE
    if mark in _CLAUSES or text[start] in "—–" or text[last - 1 : last + 1] == "--":
        return CLAUSE
    if mark in _COMMAS:
        return COMMA
    if last < end - 1 or text[start] in _OPENERS:
        return COMMA * 2
    word = _NEXT_WORD.match(text, start, start + 20)
    if word and word.group().lower() in _WORDS.get(language, ()):
        return CONJUNCTION
    return SPACE


def _between(text: str, at: int, breaks: frozenset[int]) -> float | None:
    """Cost of a cut before ``at`` where one of the neighbours is of a script without spaces; ``None``: never."""
    before, after = text[at - 1], text[at]
    if after.isspace() or before.isspace() or after in _NEVER_FIRST or before in _NEVER_LAST:
        return None
    if before in FULL_STOPS:
        return SENTENCE if before != "." else TITLE
    if before in "；：":
        return CLAUSE
    if before in _COMMAS:
        return COMMA
    if before in CLOSERS or after in "「『（【《“‘":
        return COMMA * 2
    if not separable(text, at) or before.isdigit():
        return None
    if at in breaks:
        return SPACE
    own, other = UNSPACED.match(before), UNSPACED.match(after)
    if not (own and other):
        return SPACE if before.isalnum() and after.isalnum() else None
    if "\u3041" <= before <= "\u309f" and not "\u3041" <= after <= "\u309f":  # a Japanese word often begins here
        return SPACE
    return SYLLABLE if starts_syllable(text, at) else CHARACTER


def cuts(text: str, start: int, end: int, language: str, breaks: frozenset[int] = frozenset()) -> list[Cut]:
    """Where ``text[start:end]``, a sentence, may be cut, in order: inside no word, number, address or tag."""
    whole = [match.span() for match in _WHOLE.finditer(text, start, end)]
    begins = [span[0] for span in whole]
    cased = not text.islower()  # else a small letter after a full stop says nothing

    def inside(at: int) -> bool:
        index = bisect_left(begins, at) - 1
        return index >= 0 and at < whole[index][1]

    found: dict[int, float] = {}
    for match in _GAP.finditer(text, start, end):
        if match.start() > start and match.end() < end and not inside(match.end()):
            rank = _rank(text, match.start(), match.end(), language, cased)
            found[match.end()] = max(rank, TITLE) if _NO_BREAK.issuperset(match.group()) else rank
    for match in _DASHED.finditer(text, start, end):
        if not inside(match.end()):
            found[match.end()] = CLAUSE
    if UNSPACED.search(text, start, end):
        for match in _UNSPACED_NEAR.finditer(text, start + 1, end):
            at = match.start()
            if start < at < end and not inside(at) and (cost := _between(text, at, breaks)) is not None:
                found.setdefault(at, cost)
    return [Cut(at, found[at]) for at in sorted(found)]


def parts(
    text: str,
    span: tuple[int, int],
    language: str,
    before: list[float],
    longest: float,
    breaks: frozenset[int] = frozenset(),
) -> Iterator[tuple[int, int, bool]]:
    """Start, end, and whether the cut at the end was forced, of each part of a sentence of at most ``longest`` tokens.

    ``before[i]`` are the tokens before character ``i``. Each part is as long as what remains divided by how many parts
    it needs, as nearly as the costs of the cuts near it allow. Where there is none, the cut is forced between two
    characters. Each cut is looked at a few times, so that the time is linear in the length of the sentence.
    """
    start, end = span
    places: list[Cut] = []
    positions: list[float] = []
    if before[end] - before[start] > longest:
        places = cuts(text, start, end, language, breaks)
        positions = [before[cut.at] for cut in places]
    while before[end] - before[start] > longest:
        rest = before[end] - before[start]
        share = rest / -(-rest // longest)
        low = bisect_right(positions, before[start] + share / 2)
        high = bisect_right(positions, before[start] + longest)
        if low == high:  # what follows is long and whole: the last place before it
            low = max(bisect_right(positions, before[start]), high - 1)
        if low < high:
            middle = before[start] + share
            best = min(range(low, high), key=lambda one: abs(positions[one] - middle) / share + places[one].cost)
            at, forced = places[best].at, places[best].cost >= FORCED
        else:
            at, forced = _forced(text, start, end, before, longest), True
        yield start, at, forced
        start = at
    yield start, end, False


def _forced(text: str, start: int, end: int, before: list[float], longest: float) -> int:
    """The last place between two whole characters before ``longest`` tokens are reached."""
    at = min(end - 1, max(start + 1, bisect_right(before, before[start] + longest, start, end) - 1))
    for candidate in range(at, max(start, at - 64), -1):
        if separable(text, candidate):
            return candidate
    return at
