"""Where sentences end, by rules and by sentencex."""

from __future__ import annotations

import pytest
from text_tools import HERE

from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.text import sentences, split
from chatterbox_turbo.text.sentences import segmenter, sentence_spans


@pytest.mark.parametrize("boundaries", HERE)
@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith met Mrs. Jones at 5 p.m. on Jan. 5 in the U.S. Senate.",
        "M. Dupont habite av. Foch.",
        "See vol. 2, p. 12, No. 5.",
        "Am 3. Mai kam z. B. Dr. Müller.",
        "А. С. Пушкин жил на ул. Мойки.",
        "See https://example.com/a.b?c=d.e for more.",
        "It is 3.14 or 1,234.56.",
        "He waited... and waited.",
        "To jest 3. maja.",
        "«\u00a0Où va-t-il\u00a0?\u00a0» demanda-t-elle.",
    ],
)
def test_no_sentence_ends_here(text, boundaries):
    from chatterbox_turbo.text.characters import language_code

    language = {"M": "fr", "A": "de", "«": "fr", "T": "pl"}.get(text[0], language_code(None, text))
    assert len(sentence_spans(text, language, segmenter(boundaries))) == 1


@pytest.mark.parametrize("boundaries", HERE)
@pytest.mark.parametrize(
    ("language", "parts"),
    [
        ("en", ["Is it?", "It is!", "“Yes,” she said.", "Then he left."]),
        ("zh", ["他走了。", "真的吗？", "是！"]),
        ("ja", ["はい、そうです。", "本当ですか？", "はい。"]),
        ("ar", ["هل أنت بخير؟", "نعم، أنا بخير."]),
        ("hi", ["आप कैसे हैं?", "मैं ठीक हूँ।", "हाँ।"]),
        ("ur", ["آپ کیسے ہیں؟", "میں ٹھیک ہوں۔"]),
        ("my", ["မင်္ဂလာပါ။", "နေကောင်းလား။"]),
        ("am", ["ሰላም።", "እንዴት ነህ፧"]),
        ("el", ["Πού πας;", "Πάω σπίτι."]),
    ],
)
def test_sentences_end_at_the_full_stops_of_their_script(language, parts, boundaries):
    text = ("" if language in ("zh", "ja") else " ").join(parts)
    spans = sentence_spans(text, language, segmenter(boundaries))
    assert [text[start:end] for start, end in spans] == parts


@pytest.mark.parametrize("boundaries", HERE)
def test_sentences_are_whole_where_a_window_ends(boundaries):
    for sentence in ("Is this the one that is cut?", "Long " + "and longer " * 500 + "it went!"):
        text = " ".join([sentence] * (3 * sentences.WINDOW // len(sentence) + 1))
        spans = sentence_spans(text, "en", segmenter(boundaries))
        assert {text[start:end] for start, end in spans} == {sentence}


@pytest.mark.parametrize("boundaries", HERE)
def test_a_text_without_capitals_has_sentences(boundaries):
    text = "hello there my friend. how are you today? i am fine."
    spans = sentence_spans(text, "en", segmenter(boundaries))
    assert [text[start:end] for start, end in spans] == ["hello there my friend.", "how are you today?", "i am fine."]


def test_without_sentencex_its_name_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sentences, "_sentencex", lambda: None)
    with pytest.raises(InvalidRequestError, match=r'pip install "chatterbox-turbo\[text\]"'):
        split("Hello.", boundaries="sentencex")
    assert len(split("Hello there. " * 30)) > 2, "the rules do, unless it is asked for by name"


def test_older_versions_of_sentencex_give_sentences_without_their_white_space():
    def segment(language: str, text: str) -> list[str]:
        return [part.strip() for part in text.replace("?", "?\0").replace(".", ".\0").split("\0") if part.strip()]

    text = "  One.  Two?   Three. Four"
    assert [text[start:end] for start, end in sentence_spans(text, "en", segment)] == ["One.", "Two?", "Three.", "Four"]
