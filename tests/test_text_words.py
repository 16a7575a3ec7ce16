"""Words of a text, what upstream's tokenizer makes of them, and their times by those of its tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest

from chatterbox_turbo.speech.times import matched, sentences, word_times
from chatterbox_turbo.text.words import HAN, Letter, folded, letters, words
from chatterbox_turbo.upstream.text_tokens import spelled

TEXTS = {
    "en": "“Don't” — said the FOX; it's 3 o'clock… no: 4!",
    "de": "Größe: Straße, ÄRGER – über 12 Füße.",
    "fr": "L'été, où ça ? Cœur naïf.",
    "tr": "İstanbul'da ışık ılık.",
    "el": "Ο ΟΔΟΣ είναι εδώ· ναι;",
    "ru": "Ёлка — всё ещё зелёная.",
    "pl": "Zażółć gęślą jaźń.",
    "ar": "مَرْحَبًا بالعالم، كيف الحال؟",
    "he": "שלום, עולם!",
    "hi": "नमस्ते दुनिया, कैसे हो?",
    "ko": "안녕하세요, 세계 여러분!",
    "ja": "こんにちは、コーヒーです。",
    None: "Ünïcode & more.",
}  # fmt: skip


def of(text):
    return [text[start:end] for start, end in words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  🙂 … ", []),
        ("One fox.", ["One", "fox."]),
        ("well - I, too\n(3)", ["well -", "I,", "too", "(3)"]),
        ("— yes 🙂 no", ["— yes 🙂", "no"]),
        ("私はTom です。", ["私", "は", "Tom", "で", "す。"]),
        ("がぎ", ["が", "ぎ"]),
        ("(は)「東」、Tom！", ["(は)", "「東」、", "Tom！"]),
        ("안녕 세계", ["안녕", "세계"]),
    ],
)
def test_words(text, expected):
    assert of(text) == expected


def test_letters_are_alike_however_they_are_written():
    for one, other in (("ÀÉ", "àé"), ("ΟΔΟΣ", "οδος"), ("ß", "ss"), ("İ", "i̇"), ("한", "한"), ("ﬁ２", "fi2")):
        assert folded(one) == folded(other) != ""
    assert folded("…—'“ \u0301") == "" and folded("語") == folded("话") == HAN
    assert letters("a-é") == [Letter("a", 0, 1), Letter("e", 2, 3)]


@pytest.fixture(scope="module")
def multilingual(models):
    return models("multilingual")


@pytest.mark.parametrize("language", TEXTS)
def test_each_word_is_found_again_in_upstreams_tokens(multilingual, language):
    stages, text = multilingual_stages(multilingual), TEXTS[language]
    given = stages.bind((text, language), {})
    tokens = stages.spelling(stages.ask(given, multilingual.conds))
    assert tokens[0] == "[START]" and tokens[-1] == "[STOP]"
    written = letters(text)
    own = matched(written, spelled(tokens, language))
    if "[UNK]" not in tokens:
        assert len(own) == len(written) and None not in own
    for letter, token in zip(written, own, strict=True):
        assert tokens[int(token.start)] == "[UNK]" or letter.char in folded(tokens[int(token.start)])
    assert own[0].start >= (2 if language else 1)  # not at a mark


def multilingual_stages(model):
    from chatterbox_turbo.upstream.families import identify
    from chatterbox_turbo.upstream.stages import stages

    return stages(identify(model))


def test_chinese_characters_are_found_by_their_codes(multilingual):
    """By upstream's converter with a table of a few characters; the real one comes from the hub."""
    converter = multilingual.tokenizer.cangjie_converter
    table = {"你": "onf", "好": "vnd", "世": "pt", "界": "wol"}
    converter.word2cj, converter.cj2word = dict(table), {code: [char] for char, code in table.items()}
    try:
        text = "你好，World 世界。"
        tokens = ["[START]", "[zh]", *re.findall(r"\[.*?\]|.", converter(text).replace(" ", "[SPACE]")), "[STOP]"]
    finally:
        converter.word2cj, converter.cj2word = {}, {}
    assert tokens.count("[cj_.]") == 4
    found = spelled(tokens, "zh")
    edges = np.arange(len(tokens) + 1) / 25
    times = word_times(text, found, edges, "zh")
    assert [one.source for one in times] == ["alignment"] * 5 and of(text) == ["你", "好，", "World", "世", "界。"]
    assert (times[0].start, times[0].end) == pytest.approx((2 / 25, 6 / 25))  # three keys and the end
    assert times[3].end - times[3].start == pytest.approx(3 / 25)


def test_what_is_written_otherwise_has_its_share_between_what_is_not():
    """Kanji are said in hiragana: their readings are between the kana that stay."""
    text, said = "これは東京です。", "これはとうきょうです。"
    found = spelled(["[START]", "[ja]", *said, "[STOP]"], "ja")
    edges = np.arange(len(said) + 4) / 25
    times = word_times(text, found, edges, "ja")
    assert of(text) == ["こ", "れ", "は", "東", "京", "で", "す。"]
    assert [one.source for one in times] == ["alignment"] * 3 + ["estimate"] * 2 + ["alignment"] * 2
    assert times[3].start == times[2].end == pytest.approx(5 / 25) and times[4].end == times[5].start
    assert times[3].end == times[4].start == pytest.approx((5 + 10) / 50)
    nothing = word_times(text, spelled(["[START]", "[ja]", *"abcdef", "[STOP]"], "ja"), np.arange(10) / 25, "ja")
    assert {one.source for one in nothing} == {"estimate"}
    assert (nothing[0].start, nothing[-1].end) == pytest.approx((2 / 25, 8 / 25))


def test_letters_that_a_tokenizer_does_not_know_and_tokens_of_several_letters():
    tokens = ["[START]", "[en]", "o", "n", "e", "[SPACE]", "[UNK]", "x", "[SPACE]", "th", "ree", ".", "[STOP]"]
    edges = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15], dtype=float)
    one, two, three = word_times("One þx three.", spelled(tokens, "en"), edges, "en")
    assert (one.start, one.end, two.start, two.end, three.start, three.end) == (1, 4, 5, 7, 8, 13)
    assert {one.source, two.source, three.source} == {"alignment"}
    # a letter more than the text has: the words around it stay what they are
    more = [*tokens[:6], "[UNK]", *tokens[6:]]
    found = word_times("One þx three.", spelled(more, "en"), np.arange(15.0), "en")
    assert [times.source for times in found] == ["alignment", "estimate", "alignment"]
    assert (found[2].start, found[2].end) == (10, 12)


def test_sentences_have_the_words_that_are_in_them():
    text = "One fox. Two - dogs!  "
    times = [(0.1, 0.3, "alignment"), (0.4, 0.9, "alignment"), (1.2, 1.3, "alignment"), (1.4, 1.8, "estimate")]
    piece = {"text": text, "samples": 48_000, "pause": 0.1, "words": times}
    first, second, third, *_ = sentences([piece, piece], 24_000, "en")
    assert (first.text, first.start, first.end, first.source) == ("One fox.", 0.1, 0.9, "alignment")
    assert [word.text for word in second.words] == ["Two -", "dogs!"] and second.source == "estimate"
    assert (third.start, third.words[1].end) == pytest.approx((2.1, 2.9))
    long = {"text": "a" * 900, "samples": 240_000, "pause": 0.0, "words": [(0.0, 9.0, "alignment")]}
    (only,) = sentences([long], 24_000, "en", 3.0, 6.0)  # cut inside its only word
    assert only.text == "a" * 900 and (only.start, only.end) == (0.0, 9.0)


def test_no_text_at_all():
    assert list(sentences([{"text": "🙂", "samples": 24_000, "pause": 0.0, "words": []}], 24_000)) == []
    assert word_times("", [], np.array([0.0, 1.0])) == []
