"""From texts to pieces: nothing lost, nothing torn, nothing too long; what is no text, and options."""

from __future__ import annotations

import random

import pytest
from text_tools import HERE, check

from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.text import TOKENS_PER_SECOND, Estimate, estimate_tokens, pieces, split
from chatterbox_turbo.text.cutting import cuts

_WORDS = (
    "the quick brown fox über Straße naïve Łódź it's don’t e.g. Dr. etc. U.S. NASA 7 3.14 1,234.56 12:30 1.234,56 №5"
    " https://example.com/a.b?c=d.e,f j.r.doe@mail.example.org [laugh] <br/> слово А. Пушкин λόγος مرحبا سَلَامٌ שָׁלוֹם"
    " हिन्दी क्षत्रिय 한국어 안녕하세요 cafe\u0301 z\u0335\u0321\u0321a 你好世界 こんにちは カタカナ ありがとう。 东西！"
    " สวัสดีครับ ภาษาไทย ខ្មែរ မြန်မာ 👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ☃\ufe0f می‌خواهم \u202bعربي\u202c soft\u00adhyphen"
    " zero\u200bwidth \ufeffbom nul\x00 \x07 \ud800 \udfff tab -- — … “quoted” «guillemets» (paren) 「引用」"
    " ? ! ... ?! , ; :"
)
WORDS = _WORDS.split(" ")
GAPS = (
    " ",
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    "\u00a0",
    "\u3000",
    "",
    "",
    ". ",
    ", ",
    "! ",
    "。",
    "\u2029",
)


def random_text(seed: int, length: int = 400) -> str:
    chance = random.Random(seed)
    pool = chance.sample(WORDS, chance.randint(3, len(WORDS)))
    return "".join(chance.choice(pool) + chance.choice(GAPS) for _ in range(chance.randint(1, length)))


@pytest.mark.parametrize("boundaries", HERE)
@pytest.mark.parametrize("seed", range(60))
def test_every_character_is_in_exactly_one_piece(seed, boundaries):
    text = random_text(seed)
    chance = random.Random(seed)
    longest = chance.choice([1.0, 3.0, 8.0, 18.0])
    language = chance.choice([None, "en", "zh", "ja", "th", "ar", "hi", "de-AT", "xx"])
    options = {"target": longest * chance.choice([0.5, 1.0]), "longest": longest, "shortest": 0.3}
    check(text, split(text, language, boundaries=boundaries, **options), longest)


@pytest.mark.parametrize("boundaries", HERE)
def test_a_text_comes_out_the_same_in_lines_and_in_odd_parts(boundaries):
    for seed in range(20):
        text = random_text(seed)
        whole = split(text, boundaries=boundaries)
        assert list(pieces(text.splitlines(keepends=True), boundaries=boundaries)) == whole
        chance, parts, at = random.Random(seed), [], 0
        while at < len(text):
            step = chance.randint(1, 40)
            if text[at + step - 1 : at + step + 1] == "\r\n":
                step += 1
            parts.append(text[at : at + step])
            at += step
        assert list(pieces(parts, boundaries=boundaries)) == whole


WHOLE = [
    "3.14", "1,234.56", "1.234.567,89", "12:30", "1 234 567", "$ 5", "5 %", "20 km", "https://example.com/a.b?c=d,e;f",
    "www.example.org/x-y", "j.r.doe@mail.example.org", "[laugh]", "[pause: 1 s]", "<break time='1 s'/>", "well-known",
    "[pause--long]", "https://example.com/goes/on--and-on",
    "it’s", "U.S.A.", "2024-01-05", "co\u0301te\u0301", "naïveté",
]  # fmt: skip


@pytest.mark.parametrize("boundaries", HERE)
@pytest.mark.parametrize("atom", WHOLE)
def test_no_cut_inside_numbers_addresses_and_tags(atom, boundaries):
    """In a sentence so long that it is cut near each of them, in scripts with spaces and without."""
    for filler, gap in (("word", " "), ("词", ""), ("字、", ""), ("ไทย", "")):
        for before in range(0, 50, 3):
            text = gap.join([*[filler] * before, atom, *[filler] * 40, atom, *[filler] * 9])
            starts = {piece.start for piece in split(text, target=4.0, longest=6.0, boundaries=boundaries)}
            assert len(starts) > 1
            at = text.find(atom)
            while at >= 0:
                assert not starts & set(range(at + 1, at + len(atom))), (text, sorted(starts))
                at = text.find(atom, at + 1)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("他说[大笑三声]然后走了", "[大笑三声]"),
        ("他付了3元然后走了", "3元"),
        ("一共１２人走了", "１２人"),
        ("看https://example.com/a然后", "https://example.com/a"),
        ("第三章开始了", "第三"),
        ("これはカー、それは", "カー、"),
        ("มีแมวเยอะ", "แม"),
        ("they paid 20 km, not 5 %", "20 km"),
    ],
)
def test_no_place_to_cut_lies_here(text, whole):
    at = text.index(whole)
    assert not {cut.at for cut in cuts(text, 0, len(text), "en")} & set(range(at + 1, at + len(whole)))
    assert cuts(text, 0, len(text), "en")


def test_a_long_sentence_is_cut_at_its_best_places():
    text = (
        "When the rain had stopped the children ran out into the garden and looked for snails under the hedge; nobody "
        "had told them that the gate was open, and so they were gone before anyone in the house had noticed it."
    )
    found = split(text, "en", target=7, longest=9)
    assert [piece.text[-6:] for piece in found] == ["hedge;", "ed it."]
    assert [piece.boundary for piece in found] == ["clause", "end"]
    commas = split(", ".join(["one two three four five six seven"] * 8) + ".", "en", target=4, longest=6)
    assert {piece.boundary for piece in commas[:-1]} == {"comma"}
    lengths = [piece.tokens for piece in commas]
    assert min(lengths) > 0.5 * max(lengths), "parts of similar length"
    words = split(" ".join(["word"] * 100), "en", target=4, longest=6)
    assert {piece.boundary for piece in words[:-1]} == {"word"} and not any(piece.forced for piece in words)
    assert min(piece.tokens for piece in words) > 0.8 * max(piece.tokens for piece in words)


def test_sentences_are_put_together_to_the_target():
    sentence = "This is a second or two."
    text = " ".join([sentence] * 80)
    one = estimate_tokens(sentence, "en") / TOKENS_PER_SECOND
    found = split(text, "en", target=12)
    assert all(abs(piece.seconds - 12) <= one / 2 + 0.2 for piece in found[:-1])
    assert sum(len(piece.spans) for piece in found) == 80
    slow = split(text, "en", target=12, estimate=Estimate(scale=2.0))
    assert len(slow) == pytest.approx(2 * len(found), rel=0.2), "a slow voice gets less text at once"


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n\t\r\n", "\u3000\u00a0\u2029", "🙂", "🙂🙂 👩‍👩‍👧‍👦!",
     "...", "?!", "\x00\x07", "\u200b\u200f\ufeff", "\ud800", "* * *",
     "—", "\n\n🙂\n\n"],
)  # fmt: skip
def test_nothing_to_speak(text):
    assert split(text) == []
    assert list(pieces([text, text])) == []


@pytest.mark.parametrize("text", ["a", "é", "字", "7", "ก", "я", "أ", "ｱ", "½"])
def test_one_letter(text):
    (piece,) = split(text)
    assert (piece.text, piece.start, piece.end, piece.pause, piece.boundary) == (text, 0, 1, 0.0, "end")


@pytest.mark.parametrize("text", [b"bytes", bytearray(b"x"), None, 5, ["a"]])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(InvalidRequestError, match=r"is (bytes|bytearray|NoneType|int|list)"):
        split(text)
    with pytest.raises(InvalidRequestError, match=r"line of the text|text is"):
        list(pieces([text]))


def test_bytes_are_told_how_to_become_text():
    with pytest.raises(InvalidRequestError, match="decode"):
        split(b"Hello.")
    with pytest.raises(InvalidRequestError, match="decode"):
        pieces(b"Hello.")


def test_a_subclass_of_str_is_a_text():
    class Loud(str):
        def __str__(self):
            raise AssertionError("not asked for")

    (piece,) = split(Loud("Hello there."), Loud("en"))
    assert piece.text == "Hello there." and type(piece.text) is str


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "target is 0"),
        ({"target": 20, "longest": 10}, "target is 20 s and longest 10 s"),
        ({"longest": float("nan")}, "longest is nan"),
        ({"longest": "18"}, "longest is '18'"),
        ({"shortest": -1}, "shortest is -1"),
        ({"shortest": 13}, "shortest is 13"),
        ({"pauses": {"semicolon": 1}}, "no pause 'semicolon'"),
        ({"pauses": {"comma": -0.1}}, "pause 'comma' is -0.1"),
        ({"pauses": {"comma": 1e9}}, "0 to 60 seconds"),
        ({"boundaries": "nltk"}, "boundaries is 'nltk'"),
        ({"overlap": 1}, "no option 'overlap'"),
        ({"language": 5}, "language is int"),
    ],
)
def test_options_are_checked_at_the_call(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        pieces(["Hello."], **options)
