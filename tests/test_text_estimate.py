"""Speech tokens of a text before it is spoken: by language, by what is read in words, by the voice."""

from __future__ import annotations

import pytest
from text_tools import book

from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.text import TOKENS_PER_SECOND, Estimate, estimate_tokens, pieces


@pytest.mark.parametrize(
    ("language", "text", "seconds"),
    [
        # rates of readers: 183 words a minute, of 4.3 letters (Brysbaert 2019, IReST)
        (
            "en",
            "The seas here have long been known for their fish, and people still live by them in the old towns.",
            6.5,
        ),
        ("zh", "这片海很久以来就以鱼闻名，古老的城镇里人们至今仍以捕鱼为生。", 8.0),
        ("ja", "この海は昔から魚で知られていて、古い町の人々は今でも漁で暮らしている。", 6.5),
        ("fi", "Nämä meret on kauan tunnettu kaloistaan, ja vanhojen kaupunkien väki elää yhä niistä.", 5.5),
    ],
)
def test_estimates_are_those_of_readers(language, text, seconds):
    assert estimate_tokens(text, language) / TOKENS_PER_SECOND == pytest.approx(seconds, rel=0.25)


def test_what_is_read_in_words_counts_as_words():
    def tokens(text: str) -> float:
        return estimate_tokens(text, "en")

    assert tokens("1984") > 3 * tokens("abcd") and tokens("They gave 50% to it.") > tokens("They gave 50 to it.")
    assert tokens("The BBC said") > tokens("The abc said")
    assert tokens("Wait!!!!!") < 1.3 * tokens("Wait!")
    assert tokens("1,234,567") < tokens("1, 234, 567")
    assert tokens("[a very long tag, that is one sound]") == tokens("[laugh]")
    assert tokens("") == tokens(" \n\u200b") == 0


def test_an_estimate_follows_its_voice_and_forgives_runaways():
    text = "The seas here have long been known for their fish, and people still live by them in the old towns."
    average = estimate_tokens(text, "en")
    estimate = Estimate()
    assert estimate.tokens(text, "en") == average and estimate.spread == 0.35
    for index in range(20):
        runaway = 6 if index % 4 == 3 else 1
        estimate.observe(text, 1.4 * runaway * average, "en")
    assert estimate.scale == pytest.approx(1.4) and estimate.spread < 0.35
    estimate.observe("No.", 500, "en")  # too short to say anything
    estimate.observe(text, float("nan"), "en")
    estimate.observe(text, 0, "en")
    assert estimate.scale == pytest.approx(1.4)
    for _ in range(31):
        estimate.observe(text, 0.8 * average, "en")
    assert estimate.scale == pytest.approx(0.8), "another voice is learnt anew"
    with pytest.raises(InvalidRequestError, match="scale"):
        Estimate(scale=0)


def test_pieces_follow_an_estimate_while_a_book_is_read():
    estimate = Estimate()
    found = pieces(book(20_000), "en", estimate=estimate)
    first = [next(found) for _ in range(5)]
    for piece in first:
        estimate.observe(piece.text, 2 * piece.tokens, "en")
    later = list(found)[4:]
    letters = [sum(len(piece.text) for piece in some) / len(some) for some in (first[1:], later)]
    assert letters[1] < 0.75 * letters[0]
