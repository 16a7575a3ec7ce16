"""Numbers, amounts, dates and abbreviations as words, and what is left as it is."""

from __future__ import annotations

import random
import warnings
from decimal import Decimal

import pytest

from chatterbox_turbo.errors import InvalidRequestError, NumbersKeptWarning
from chatterbox_turbo.text import NORMALIZED_LANGUAGES, normalization, normalize, split

pytest.importorskip("num2words", reason="numbers become words by num2words (the extra text)")

CASES = [
    ("en", "He has 3 cats and 1,234 dogs.", "He has three cats and one thousand, two hundred and thirty-four dogs."),
    ("en", "It is 3.14 or -2.", "It is three point one four or minus two."),
    ("en", "the 1st, 22nd and 103rd", "the first, twenty-second and one hundred and third"),
    ("en", "5% of it, 2.5 % of that", "five percent of it, two point five percent of that"),
    ("en", "$5, $1, $0.99 and €2", "five dollars, one dollar, ninety-nine cents and two euros"),
    ("en", "it cost £3.50", "it cost three pounds and fifty pence"),
    ("en", "at 9:05, 10:00, 12:30 and 5:00 p.m.", "at nine oh five, ten o'clock, twelve thirty and five p.m."),
    ("en", "In 1984 and since 2007.", "In nineteen eighty-four and since two thousand and seven."),
    ("en", "It cost 1984.", "It cost one thousand, nine hundred and eighty-four."),
    ("en", "On January 5, 2024, no", "On January fifth, twenty twenty-four, no"),
    ("en", "on Feb. 3rd and 4 July 1776", "on February third and July fourth, seventeen seventy-six"),
    ("en", "from 2024-01-05 on", "from January fifth, twenty twenty-four on"),
    ("en", "May 2020 was warm.", "May twenty twenty was warm."),
    ("en", "Dr. Smith and Prof. Jones met Mr. Brown.", "Doctor Smith and Professor Jones met Mister Brown."),
    ("en", "fruit, e.g. apples, i.e. food, vs. none", "fruit, for example apples, that is food, versus none"),
    ("en", "pears, etc. were there; so on, etc.", "pears, et cetera were there; so on, et cetera."),
    ("en", "St. Mary lives on Main St. in town, No. 5.", "Saint Mary lives on Main Street in town, number five."),
    ("en", "He went to St. Paul.", "He went to Saint Paul."),
    ("en", "Main St. Bridge", "Main St. Bridge"),
    ("de", "Er hat 1.234,5 kg und 5 %.", "Er hat eintausendzweihundertvierunddreißig Komma fünf kg und fünf Prozent."),
    ("de", "um 12:30 Uhr und 1:00", "um zwölf Uhr dreißig und ein Uhr"),
    ("de", "1 € und 2,50 €", "ein Euro und zwei Euro und fünfzig Cent"),
    ("fr", "le 1er, la 2e, 1:05", "le premier, la deuxième, une heure cinq"),
    ("fr", "1 234 francs", "mille deux cent trente-quatre francs"),
    ("fr", "Il a 5 % de 3,5.", "Il a cinq pour cent de trois virgule cinq."),
    ("es", "el 1º y la 2ª, 13:15", "el primero y la segunda, trece y quince"),
    ("es", "3,50 €", "tres euros con cincuenta céntimos"),
    ("it", "3,14 e 5 % e 1.000", "tre virgola uno quattro e cinque per cento e mille"),
    ("pt", "a 1ª vez, 2,5 %", "a primeira vez, dois vírgula cinco por cento"),
    ("nl", "10:15 en 3 €", "tien uur vijftien en drie euro"),
    ("ja", "価格は3.14円、5%です。", "価格は三点一四円、五パーセントです。"),
    ("ko", "가격은 12달러, 5%.", "가격은 십이달러, 오퍼센트."),
    ("ru", "Это 12 и 3,5.", "Это двенадцать и три целых пять десятых."),
    ("ar", "السعر 12", "السعر اثنا عشر"),
    ("pl", "-5 i 3,1", "minus pięć i trzy przecinek jeden"),
    ("sv", "3,1 och 5 %", "tre komma ett och fem procent"),
    ("tr", "12 ve 3,1", "oniki ve üç virgül bir"),
    ("pt-BR", "21", "vinte e um"),
    ("en", "It is 0.0000001.", "It is zero point zero zero zero zero zero zero one."),
    ("ru", "Это 0,0000001.", "Это 0,0000001."),
    ("de", "0,00000015", "null Komma null null null null null null eins fünf"),
]  # fmt: skip


@pytest.mark.parametrize(("language", "text", "words"), CASES)
def test_numbers_become_words(language, text, words):
    assert normalize(text, language) == words


KEPT = [
    "https://example.com/5?a=3.14&b=2024-01-05", "www.example.org/12", "example.com/5", "j5.doe2@mail3.example.org",
    "[pause:1s]", "[laugh 3]", "<break time='1.5 s'/>", "v2.0.1", "2.0.1", "192.168.0.1", "COVID-19", "B2B", "A4",
    "007", "555-1234", "10-20", "3/4", "1_000", "#5", "x=3", "file5.txt", "12345678901234567890", "3rdparty", "§5",
    "₽5", "7°",
]  # fmt: skip


@pytest.mark.parametrize("text", KEPT)
def test_addresses_tags_and_codes_stay(text):
    for around in ("{}", "See {} here", "({})", "Look: {}, then go."):
        sentence = around.format(text)
        assert normalize(sentence, "en") == sentence
        assert normalize(sentence, "de") == sentence


def test_what_has_no_number_stays():
    for text in ("", "Hello there.", "a.m. U.S. Ms. Dr.", "He said no. Then he left.", "\ud800"):
        assert normalize(text, "en") == text


@pytest.mark.parametrize("language", NORMALIZED_LANGUAGES)
def test_every_language_reads_every_kind_of_number(language):
    decimal = normalization._FORMATS[language][0]
    chance = random.Random(3)
    numbers = [
        0,
        1,
        2,
        10,
        11,
        12,
        21,
        99,
        100,
        101,
        999,
        1000,
        1001,
        10_000,
        123_456,
        1_000_000,
        10**9,
        999_999_999_999,
    ]
    numbers += [chance.randrange(10 ** chance.randint(1, 12)) for _ in range(200)]
    for number in numbers:
        for text in (str(number), f"-{number}", f"{number}{decimal}05"):
            words = normalize(f"( {text} )", language)
            assert not any(character.isdigit() for character in words), (text, words)
            assert len(words) >= 5
    seen = {normalization.number_words(Decimal(number), language) for number in range(1000)}
    assert len(seen) == 1000, "different numbers, different words"


@pytest.mark.parametrize("language", ["zh", "hi", "el", "ms", "sw", "xx"])
def test_a_language_without_rules_is_told(language):
    with pytest.raises(InvalidRequestError, match=r"Languages that can: en, ar"):
        normalize("5", language)


@pytest.mark.parametrize(("language", "text"), [("zh", "价格是3元。"), (None, "价格是3元。"), ("sw", "Ana paka 3.")])
def test_numbers_stay_where_there_are_no_rules_which_is_told_once(monkeypatch, language, text):
    monkeypatch.setattr(normalization, "_told", set())
    code = language or "zh"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            assert [piece.text for piece in split(f"{text} …\n\n{text}", language, normalize=True)] == [
                f"{text} …",
                text,
            ]
        split("没有" if code == "zh" else "Paka.", "el", normalize=True)  # no number
    assert [(one.category, str(one.message).partition(":")[0]) for one in told] == [
        (NumbersKeptWarning, f"Numbers in '{code}' stay as they are written")
    ]


def test_bytes_are_refused():
    with pytest.raises(InvalidRequestError, match="decode"):
        normalize(b"5", "en")


def test_without_the_library_the_command_is_told(monkeypatch):
    monkeypatch.setattr(normalization, "_library", lambda: None)
    for call in (lambda: normalize("5", "en"), lambda: split("5", "en", normalize=True)):
        with pytest.raises(InvalidRequestError, match=r'not installed. Run: pip install "chatterbox-turbo\[text\]"'):
            call()
    with pytest.raises(InvalidRequestError, match="not installed"):
        split("5", normalize=True)


def test_pieces_speak_words_and_keep_their_offsets():
    text = "He has 3 cats.\n\nShe paid $5."
    plain, words = split(text, "en"), split(text, "en", normalize=True)
    assert [piece.text for piece in words] == ["He has three cats.", "She paid five dollars."]
    assert [(piece.start, piece.end) for piece in words] == [(piece.start, piece.end) for piece in plain]
    mixed = split("It has 3 doors.\n\n价格是3元。", normalize=True)
    assert [piece.text for piece in mixed] == ["It has three doors.", "价格是3元。"], (
        "Chinese stays: there are no rules"
    )


def test_time_is_linear():
    import time

    unit = "In 1984 Dr. Smith paid $3.50 at 9:05, e.g. 5%. 1,234 a.b.c 1.2.3 @x "

    def seconds(times: int) -> float:
        start = time.process_time()
        normalize(unit * times, "en")
        return time.process_time() - start

    seconds(10)
    ratios = [seconds(400) / seconds(200) for _ in range(4)]
    assert min(ratios) < 2.5, ratios


@pytest.mark.parametrize("unit", ["1 ", "1,", "1.1", "a.", "a@", "[", "$", "-", "5 % ", "1:"])
def test_nothing_takes_the_square_of_the_length(unit):
    import time

    start = time.process_time()
    normalize(unit * 5000, "en")
    assert time.process_time() - start < 5
