"""English: abbreviations that mean one thing, and dates and years, as words."""

from __future__ import annotations

import re
from collections.abc import Callable

Number = Callable[[int, str], str]  # a number and "cardinal", "ordinal" or "year", to words

# before a capital letter only, so that the sentence goes on
_TITLES = {
    "Dr": "Doctor", "Mr": "Mister", "Mrs": "Missus", "Prof": "Professor", "Capt": "Captain", "Sgt": "Sergeant",
    "Lt": "Lieutenant", "Col": "Colonel", "Gov": "Governor", "Rev": "Reverend",
}  # fmt: skip
_TITLE = re.compile(rf"\b({'|'.join(_TITLES)})\.(?=\s+[A-Z])")
_PHRASES = {"e.g.": "for example", "i.e.": "that is", "vs.": "versus", "approx.": "approximately", "cf.": "compare"}
_PHRASE = re.compile(rf"(?<![\w.])({'|'.join(re.escape(one) for one in _PHRASES)})(?=[\s,)])")
_ETC = re.compile(r"\betc\.(?=\s*[,;:)]|\s+[a-z])")
_NUMBER = re.compile(r"\b(No|Nos)\.(?=\s?\d)")
_SAINT = re.compile(r"(?:\b([A-Z][a-z]+)\s+)?\bSt\.(?=\s+[A-Z][a-z])")
_NO_NAMES = {"And", "At", "By", "For", "From", "In", "Near", "Of", "On", "Our", "The", "To", "With"}  # Main St. Bridge
_STREET = re.compile(r"(?<=[a-z]\s)St\.(?=\s+[a-z]|[,;])")

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_SHORT = {"Jan": "January", "Feb": "February", "Mar": "March", "Apr": "April", "Jun": "June", "Jul": "July",
          "Aug": "August", "Sep": "September", "Sept": "September", "Oct": "October", "Nov": "November",
          "Dec": "December"}  # fmt: skip
_SHORT_MONTH = re.compile(rf"\b({'|'.join(_SHORT)})\.?(?=\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?!:))")
_YEAR = r"(1[1-9]\d\d|20\d\d)"
_END = r"(?![\w/%°]|[.,:-]\d|\s?(?:percent|dollars|euros|people|years|times|km|miles)\b)"
_MONTH_DAY = re.compile(rf"\b({_MONTHS})\s+(\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s+{_YEAR})?{_END}")
_DAY_MONTH = re.compile(rf"(?<![\w.,/-])(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?({_MONTHS})\b(?:,?\s+{_YEAR}{_END})?")
_MONTH_YEAR = re.compile(rf"\b({_MONTHS}),?\s+{_YEAR}{_END}")
_ISO = re.compile(rf"(?<![\w.,/:-]){_YEAR}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(?![\w-])")
_IN_YEAR = re.compile(
    rf"\b((?:[Ii]n|[Ss]ince|[Bb]y|[Uu]ntil|[Bb]efore|[Aa]fter|[Oo]f|[Ff]rom|[Dd]uring|[Yy]ear|[Ss]ummer|[Ss]pring"
    rf"|[Aa]utumn|[Ww]inter|[Cc]irca)\s+){_YEAR}{_END}"
)


def abbreviations(text: str) -> str:
    """Those that mean one thing where they stand: ``Dr. Who``, ``e.g.``, ``No. 5``, ``St. Mary``, ``Main St. is``."""
    if "." not in text:
        return text
    text = _TITLE.sub(lambda match: _TITLES[match.group(1)], text)
    text = _PHRASE.sub(lambda match: _PHRASES[match.group(1)], text)
    text = _ETC.sub("et cetera", text).replace("etc.", "et cetera.")
    text = _NUMBER.sub(lambda match: "number" if match.group(1) == "No" else "numbers", text)
    return _STREET.sub("Street", _SAINT.sub(_saint, text))


def _saint(match: re.Match[str]) -> str:
    name = match.group(1)
    return match.group() if name and name not in _NO_NAMES else match.group()[:-3] + "Saint"


def dates(text: str, number: Number) -> str:
    """Dates and years, which are read in pairs of digits, where the words around say that they are such."""

    def date(month: str, day: str, year: str | None) -> str | None:
        if not 1 <= int(day) <= 31:
            return None
        return f"{month} {number(int(day), 'ordinal')}" + (f", {number(int(year), 'year')}" if year else "")

    def month_day(match: re.Match[str]) -> str:
        return date(match.group(1), match.group(2), match.group(3)) or match.group()

    def day_month(match: re.Match[str]) -> str:
        return date(match.group(2), match.group(1), match.group(3)) or match.group()

    def iso(match: re.Match[str]) -> str:
        return date(_MONTHS.split("|")[int(match.group(2)) - 1], match.group(3), match.group(1)) or match.group()

    text = _SHORT_MONTH.sub(lambda match: _SHORT[match.group(1)], text)
    text = _ISO.sub(iso, text)
    text = _MONTH_DAY.sub(month_day, text)
    text = _DAY_MONTH.sub(day_month, text)
    text = _MONTH_YEAR.sub(lambda match: f"{match.group(1)} {number(int(match.group(2)), 'year')}", text)
    return _IN_YEAR.sub(lambda match: match.group(1) + number(int(match.group(2)), "year"), text)
