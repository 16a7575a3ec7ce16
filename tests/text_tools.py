"""What the tests of texts share: who finds sentences here, what holds for any pieces, and the lines of a book."""

from __future__ import annotations

import itertools
import random
import unicodedata

from chatterbox_turbo.text import PAUSES, TOKENS_PER_SECOND, Piece, sentences
from chatterbox_turbo.text.characters import clean, separable

HERE = ["rules"] + (["sentencex"] if sentences.available() else [])


def sounds(text: str) -> str:
    return "".join(character for character in text if character.isalnum())


def check(text: str, found: list[Piece], longest: float) -> None:
    """Whatever the text, whatever the options."""
    if not sounds(clean(text).text):
        assert found == []
        return
    owners = [0] * len(text)
    for piece in found:
        assert 0 <= piece.start < piece.end <= len(text)
        for index in range(piece.start, piece.end):
            owners[index] += 1
    torn = [index for index, character in enumerate(text) if owners[index] != 1 and not character.isspace()]
    assert not torn, (torn[:3], text[max(0, torn[0] - 20) : torn[0] + 20])
    assert max(owners) <= 1
    for piece in found:
        assert sounds(piece.text) == sounds(clean(text[piece.start : piece.end]).text)
        assert sounds(piece.text), "a piece with nothing to speak"
        assert piece.text == " ".join(piece.text.split()), "white space is run together"
        assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in piece.text)
        assert piece.tokens <= longest * TOKENS_PER_SECOND + 1e-6 or len(piece.text) == 1
        assert piece.boundary in (*PAUSES, "end") and (piece.boundary == "end") == (piece is found[-1])
        assert piece.pause == PAUSES.get(piece.boundary, 0.0)
        for span in piece.spans:
            assert piece.start <= span.start < span.end <= piece.end
    for one, two in itertools.pairwise(found):
        assert one.end <= two.start and one.paragraph <= two.paragraph and one.chapter <= two.chapter
        assert two.sentences[0] - one.sentences[-1] in (0, 1), "sentences are numbered without a gap"
        if one.end == two.start and len(one.text) > 1:  # cut where there is no white space
            whole = clean(text[one.start : two.end])
            at = len(clean(text[one.start : one.end]).text)
            assert separable(whole.text, at), (one.text[-5:], two.text[:5])
            assert unicodedata.category(whole.text[at])[0] != "M", "an accent without its letter"
            assert whole.text[at - 1] not in "\u200d\u0e40\u0e41\u0e42\u0e43\u0e44", "half an emoji, half a syllable"


def book(characters: int):
    """Lines of a book, made when they are asked for."""
    chance = random.Random(7)
    made = chapter = 0
    while made < characters:
        chapter += 1
        yield f"CHAPTER {chapter}\n"
        yield "\n"
        for _ in range(30):
            words = " ".join(
                chance.choice(["rain", "garden", "house,", "was", "the", "late.", "And"]) for _ in range(90)
            )
            for start in range(0, len(words), 70):
                yield words[start : start + 70] + "\n"
                made += 71
            yield "\n"
