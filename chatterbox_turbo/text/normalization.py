"""Numbers, amounts, dates, times and common abbreviations as words, by num2words. Only where its language has them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib import import_module
from types import ModuleType

from ..errors import InvalidRequestError, NumbersKeptWarning
from .characters import language_code, plain
from .english import abbreviations, dates
from .sentences import INSTALL

# decimal mark, marks between thousands, how the decimal mark and a minus are read; num2words and upstream's models have
# these languages
_FORMATS: dict[str, tuple[str, str, str, str]] = {
    "en": (".", ",", "point", "minus"),
    "ar": (".", ",", "فاصلة", "سالب"),
    "da": (",", ". ", "komma", "minus"),
    "de": (",", ". ", "Komma", "minus"),
    "es": (",", ". ", "coma", "menos"),
    "fi": (",", " ", "pilkku", "miinus"),
    "fr": (",", " ", "virgule", "moins"),
    "he": (".", ",", "נקודה", "מינוס"),
    "it": (",", ". ", "virgola", "meno"),
    "ja": (".", ",", "点", "マイナス"),
    "ko": (".", ",", "점", "마이너스"),
    "nl": (",", ". ", "komma", "min"),
    "no": (",", " ", "komma", "minus"),
    "pl": (",", " ", "przecinek", "minus"),
    "pt": (",", ". ", "vírgula", "menos"),
    "ru": (",", " ", "", "минус"),
    "sv": (",", " ", "komma", "minus"),
    "tr": (",", ".", "virgül", "eksi"),
}
NORMALIZED_LANGUAGES = tuple(_FORMATS)
_told: set[str] = set()  # languages without rules that were warned of

_PERCENT = {
    "en": "percent", "da": "procent", "de": "Prozent", "es": "por ciento", "fi": "prosenttia", "fr": "pour cent",
    "it": "per cento", "ja": "パーセント", "ko": "퍼센트", "nl": "procent", "no": "prosent", "pt": "por cento",
    "sv": "procent",
}  # fmt: skip
_CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY"}
# one of it, several, one hundredth, several: num2words has the last two in words that depend on nothing else here
_AMOUNTS: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "en": {"$": ("dollar", "dollars", "cent", "cents"), "€": ("euro", "euros", "cent", "cents"),
           "£": ("pound", "pounds", "penny", "pence"), "¥": ("yen", "yen", "sen", "sen")},
    "de": {"$": ("Dollar", "Dollar", "Cent", "Cent"), "€": ("Euro", "Euro", "Cent", "Cent")},
    "fr": {"$": ("dollar", "dollars", "cent", "cents"), "€": ("euro", "euros", "centime", "centimes")},
    "es": {"$": ("dólar", "dólares", "centavo", "centavos"), "€": ("euro", "euros", "céntimo", "céntimos")},
    "it": {"$": ("dollaro", "dollari", "centesimo", "centesimi"), "€": ("euro", "euro", "centesimo", "centesimi")},
    "pt": {"$": ("dólar", "dólares", "centavo", "centavos"), "€": ("euro", "euros", "cêntimo", "cêntimos")},
    "nl": {"$": ("dollar", "dollar", "cent", "cent"), "€": ("euro", "euro", "cent", "cent")},
}  # fmt: skip
_TIMES = {  # what stands between hours and minutes; alone, after full hours
    "en": ("", "o'clock"), "de": (" Uhr", "Uhr"), "fr": (" heures", "heures"), "es": (" y", "en punto"),
    "it": (" e", "in punto"), "nl": (" uur", "uur"),
}  # fmt: skip
_ONE_HOUR = {"de": "ein", "fr": "une", "es": "una", "it": "una"}
_ONE = {"de": "ein", "es": "un", "it": "un"}  # before a noun
_ORDINALS = {
    "en": re.compile(r"(\d{1,4})(?:st|nd|rd|th)\b"),
    "fr": re.compile(r"(\d{1,4})(?:er|ère|e|ème)\b"),
    "es": re.compile(r"(\d{1,3})(º|ª)"),
    "it": re.compile(r"(\d{1,3})(º|°|ª)(?!\s?[CF]\b)"),
    "pt": re.compile(r"(\d{1,3})(º|ª)"),
}

# never touched: addresses, tags, versions, codes in which digits and letters or several marks mix, leading zeros
_KEPT = re.compile(
    r"\[[^\[\]\n]{1,60}\]|<[^<>\n]{1,200}>|(?:https?|ftp)://\S+|www\.\S+"
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"
    r"|(?<![\w.])(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,}(?:/\S*)?(?![\w.])"
)
_BEFORE, _AFTER = r"(?<![A-Za-z0-9_.,:/#~+*^=-])", r"(?![A-Za-z0-9_/*^=~]|[.,:-]\d|-[A-Za-z]{2})"
_SIGN = r"(?:(?<!\S)[-−](?=\d))?"


@cache
def _library() -> ModuleType | None:
    try:
        return import_module("num2words")
    except ImportError:
        return None


def check_language(language: str) -> None:
    """``InvalidRequestError`` where ``language`` cannot be normalized, or num2words is missing."""
    if language not in _FORMATS:
        raise InvalidRequestError(
            f"Numbers of {language!r} cannot be put into words.",
            "num2words does not have the language." if language not in ("", "en") else "",
            f"Languages that can: {', '.join(NORMALIZED_LANGUAGES)}. Or leave normalize off.",
        )
    check_library()


def check_library() -> None:
    """``InvalidRequestError`` where num2words is missing."""
    if _library() is None:
        raise InvalidRequestError("Numbers cannot be put into words:", "num2words is not installed.", f"Run: {INSTALL}")


def normalize(text: str, language: str | None = None) -> str:
    """``text`` with numbers, percentages, amounts, times and ordinals as words; for English dates, years and some
    abbreviations too (docs/long_text.md has which for which language).

    Addresses, tags (``[laugh]``), versions, codes and numbers with leading zeros stay as they are, and so does whatever
    the language has no rule for.

    Raises:
        InvalidRequestError: a language without rules, or num2words is not installed.
    """
    text = plain(text)
    language = language_code(language, text)
    check_language(language)
    out, at = [], 0
    for kept in _KEPT.finditer(text):
        out += [_words(text[at : kept.start()], language), kept.group()]
        at = kept.end()
    return "".join([*out, _words(text[at:], language)])


def normalized(text: str, language: str) -> str:
    """As ``normalize``, but a text in a language without rules stays as it is.

    Warns:
        NumbersKeptWarning: it has digits; once a process and language.
    """
    if language in _FORMATS:
        return normalize(text, language)
    if language not in _told and re.search(r"\d", text):
        _told.add(language)
        warnings.warn(
            f"Numbers in {language!r} stay as they are written: there are no rules for it. "
            f"Languages with rules: {', '.join(NORMALIZED_LANGUAGES)}.",
            NumbersKeptWarning,
            stacklevel=2,
        )
    return text


def _words(text: str, language: str) -> str:
    if language == "en":
        text = abbreviations(text)
    if re.search(r"\d", text) is None:
        return text
    if language == "en":
        text = dates(text, lambda number, kind: number_words(Decimal(number), "en", kind))
    for pattern, replace in _rules(language):
        text = pattern.sub(replace, text)
    return text


def number_words(value: Decimal, language: str, kind: str = "cardinal") -> str:
    """A number in words: ``"cardinal"``, ``"ordinal"`` or ``"year"``."""
    module = _library()
    assert module is not None  # check_language has looked
    mark, minus = _FORMATS[language][2:]
    space = "" if language == "ja" else " "
    if value < 0:
        return minus + space + number_words(-value, language, kind)
    whole = int(value)
    if kind != "cardinal" or value == whole:
        return module.num2words(whole, lang=language, to=kind)
    if not mark:  # Russian reads hundredths
        return module.num2words(float(value), lang=language)
    digits = [module.num2words(int(digit), lang=language) for digit in format(value, "f").split(".")[1]]
    return space.join([module.num2words(whole, lang=language), mark, *digits])


def _parsed(text: str, language: str) -> Decimal | None:
    """The number that ``text`` writes, ``None`` for one that is better left alone."""
    decimal, thousands = _FORMATS[language][:2]
    for mark in thousands + "\u00a0\u202f":
        text = text.replace(mark, "")
    text = text.replace(decimal, ".").replace("−", "-")
    digits = text.lstrip("-")
    if (len(digits) > 1 and digits[0] == "0" and digits[1] != ".") or len(digits) > 15:
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    # where num2words reads the fraction it takes a float, and stumbles over an exponent
    return None if not _FORMATS[language][2] and 0 < abs(value) < Decimal("0.0001") else value


def _number(language: str) -> str:
    decimal, thousands = _FORMATS[language][:2]
    between = re.escape(thousands + "\u00a0\u202f")
    return rf"(?:\d{{1,3}}(?:[{between}]\d{{3}})+|\d+)(?:{re.escape(decimal)}\d+)?"


@cache
def _rules(language: str) -> list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]]:
    """Patterns of a language and what each becomes, in order."""
    number = _number(language)
    rules: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = []

    def worded(make: Callable[[Decimal, re.Match[str]], str | None], group: int = 1) -> Callable[[re.Match[str]], str]:
        def replace(match: re.Match[str]) -> str:
            value = _parsed(match.group(group), language)
            words = None if value is None else make(value, match)
            return match.group() if words is None else words

        return replace

    if language in _ORDINALS:
        rules.append((re.compile(_BEFORE + _ORDINALS[language].pattern), lambda match: _ordinal(match, language)))
    if language in _TIMES:
        clock = r"([01]?\d|2[0-3]):([0-5]\d)(?![\d:])(?:\s?(Uhr|uur|h)\b)?" + r"(?!\w)"
        rules.append((re.compile(_BEFORE + clock), lambda match: _time(match, language)))
    if language in _AMOUNTS:
        signs = "".join(_AMOUNTS[language])
        first = rf"(?<![\w.,])([{signs}])\s?({number}){_AFTER}(?!\s?(?:million|billion|trillion|[kKmMbB]\b))"
        last = rf"{_BEFORE}({number})\s?([{signs}])(?![A-Za-z0-9])"
        rules.append((re.compile(first), worded(lambda value, match: _amount(value, match.group(1), language), 2)))
        rules.append((re.compile(last), worded(lambda value, match: _amount(value, match.group(2), language))))
    if language in _PERCENT:
        space = "" if language in ("ja", "ko") else " "
        percent = re.compile(rf"{_BEFORE}({_SIGN}{number})\s?[%％](?![A-Za-z0-9])")
        rules.append((percent, worded(lambda value, _: number_words(value, language) + space + _PERCENT[language])))
    # what a sign without a rule stands beside keeps its digits: a symbol between words is worse than a number
    plain_number = re.compile(rf"(?<![$€£¥₽₩§№]){_BEFORE}({_SIGN}{number}){_AFTER}(?!\s?[%％‰°$€£¥₽₩ºª])")
    rules.append((plain_number, worded(lambda value, _: number_words(value, language))))
    return rules


def _ordinal(match: re.Match[str], language: str) -> str:
    words = number_words(Decimal(match.group(1)), language, "ordinal")
    feminine = language in ("es", "it", "pt") and match.group(2) == "ª"
    if language == "fr" and match.group().endswith("ère"):
        return "première"
    return " ".join(word[:-1] + "a" if word.endswith("o") else word for word in words.split()) if feminine else words


def _time(match: re.Match[str], language: str) -> str:
    hour, minute = int(match.group(1)), int(match.group(2))
    between, full = _TIMES[language]
    hours = _ONE_HOUR.get(language) if hour == 1 else None
    hours = hours or number_words(Decimal(hour), language)
    if language == "fr" and hour < 2:
        between, full = between.rstrip("s"), full.rstrip("s")
    if minute == 0:
        spoken = re.match(r"\s?[ap]\.?\s?m\b", match.string[match.end() :], re.IGNORECASE)
        return hours if spoken else f"{hours} {full}"
    minutes = number_words(Decimal(minute), language)
    if language == "en" and minute < 10:
        minutes = f"oh {minutes}"
    return f"{hours}{between} {minutes}"


def _amount(value: Decimal, sign: str, language: str) -> str | None:
    """Dollars and cents; ``None`` for more than two decimals."""
    one, several, hundredth, hundredths = _AMOUNTS[language][sign]
    whole, cents = int(value), int(value * 100) % 100
    if value * 100 != int(value * 100):
        return None
    head = _ONE.get(language, "") if whole == 1 else ""
    head = head or number_words(Decimal(whole), language)
    words = f"{head} {one if whole == 1 else several}"
    if not cents:
        return words
    part = (_ONE.get(language, "") if cents == 1 else "") or number_words(Decimal(cents), language)
    joined = {"en": "and", "es": "con", "fr": "et", "it": "e", "pt": "e", "de": "und", "nl": "en"}[language]
    tail = f"{part} {hundredth if cents == 1 else hundredths}"
    return f"{words} {joined} {tail}" if whole else tail
