"""Characters and scripts: what has no sound, what belongs together, and cuts where there are no spaces."""

from __future__ import annotations

import unicodedata

import pytest
from text_tools import check

from chatterbox_turbo.text import Splitting, split


def test_characters_without_a_sound_go_and_offsets_stay():
    text = "\ufeffHe\u200bllo\x00 wor\u00adld.\u200e \ud800Bye\u202c now.\x07"
    found = split(text, target=0.5, longest=3, shortest=0)
    assert [piece.text for piece in found] == ["Hello world.", "Bye now."]
    assert (found[0].start, found[-1].end) == (0, len(text))
    assert text[found[1].start : found[1].end] == "\ud800Bye\u202c now.\x07"


def test_joiners_that_are_spelling_stay():
    for text in ("می‌خواهم", "क्‍ष", "👩‍👩‍👧‍👦 hi"):
        assert split(text)[0].text == text
    assert split("a\u200db\u200c")[0].text == "ab"


def test_composed_and_decomposed_texts_are_cut_alike():
    text = "Él café está aquí, señor; ¿qué más querría usted tomar hoy? Nada más, gracias. " * 10
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    one, two = (split(form, "es", target=4, longest=6) for form in (composed, decomposed))
    assert [piece.text for piece in one] == [unicodedata.normalize("NFC", piece.text) for piece in two]
    check(decomposed, two, 6)


def test_right_to_left_text_with_marks():
    text = "\u202bقال \u200fأحمد: «مرحبا بكم في بيتنا يا أصدقاء»، ثم جلس\u202c. ثُمَّ ذَهَبَ إِلَى الْمَدْرَسَةِ فِي الصَّبَاحِ؟ نعم!"
    found = split(text, "ar", target=3, longest=5)
    check(text, found, 5)
    assert not any(set("\u202b\u200f\u202c") & set(piece.text) for piece in found)


def test_scripts_without_spaces_are_cut_at_their_punctuation():
    text = "我们今天去公园，看到了很多花；然后回家吃饭、看书，" * 6 + "最后睡觉。"
    found = split(text, "zh", target=5, longest=7)
    assert all(piece.text[-1] in "，；、。" and not piece.forced for piece in found)
    assert {piece.boundary for piece in found[:-1]} <= {"comma", "clause"}


@pytest.mark.parametrize("text", ["字" * 300, "ไทยเขมรเก่าน้ำ" * 40, "ภาษาไทยเป็นภาษาที่สวยงาม" * 30, "ខ្មែរ" * 80])
def test_without_punctuation_they_are_cut_between_whole_characters_and_say_so(text):
    found = split(text, target=5, longest=7)
    check(text, found, 7)
    assert len(found) > 3 and all(piece.forced for piece in found[:-1]) and not found[-1].forced
    assert min(piece.tokens for piece in found) > 0.4 * max(piece.tokens for piece in found)


def test_japanese_prefers_where_words_begin():
    text = "私は昨日の朝に友達と一緒に新しい学校へ行って先生と長い話をしてから家に帰った" * 4
    found = split(text, "ja", target=5, longest=7)
    assert not any(piece.forced for piece in found)
    for piece in found[1:]:
        assert "\u3041" <= text[piece.start - 1] <= "\u309f" < text[piece.start]


def test_zero_width_spaces_mark_words_in_khmer_and_thai():
    text = "\u200b".join(["ភាសា", "ខ្មែរ", "ល្អ"] * 40)
    words = {0}
    for index, character in enumerate(text):
        if character == "\u200b":
            words.add(index + 1)
    found = split(text, target=4, longest=6)
    assert len(found) > 2 and not any(piece.forced for piece in found)
    assert {piece.start + (text[piece.start] == "\u200b") for piece in found} <= words


@pytest.mark.parametrize("unit", ["a", "e\u0301", "👍🏽", "🇩🇪", "z\u0335\u0321\u0322"])
def test_ten_thousand_characters_without_a_space(unit):
    text = unit * (10_000 // len(unit)) + "x"
    found = split(text, "en")
    check(text, found, Splitting().longest)
    if unit[0].isalpha():
        assert len(found) > 10 and all(piece.forced for piece in found[:-1])


def test_marks_without_an_end_are_not_spoken():
    assert [piece.text for piece in split("-" * 100_000 + "a")][-1].endswith("a")
    assert len(split("Hello" + "!" * 100_000)) < 3
    assert split("Hello" + " 🙂" * 20_000)[0].text.startswith("Hello")
