"""What one piece of a text is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Boundary = Literal["word", "comma", "clause", "sentence", "paragraph", "chapter", "end"]


@dataclass(frozen=True)
class Span:
    """A sentence, or the part of one, inside a piece.

    Attributes:
        sentence: number of the sentence in the whole text, from 0.
        start, end: its offsets in the original text; what is never spoken around it belongs to the piece alone.
        tokens: estimated speech tokens.
    """

    sentence: int
    start: int
    end: int
    tokens: float


@dataclass(frozen=True)
class Piece:
    """What is spoken at once.

    Attributes:
        text: what is spoken: the original without what has no sound (controls, zero-width characters, ornaments between
            paragraphs, the ``#`` of a heading), white space run together, numbers as words where that was asked for.
        start, end: offsets in the original text. Each of its characters that is not white space lies in exactly one
            piece.
        pause: seconds of silence before the next piece, 0 after the last one. What the piece's own speech ends with
            comes on top.
        boundary: what the piece ends at: that of the pause, ``"end"`` at the end of the text.
        tokens: estimated speech tokens, 25 a second.
        spans: its sentences.
        paragraph: number of the paragraph that it begins in, from 0.
        chapter: number of the chapter: 0 before the first heading, then from 1.
        heading: is it a heading? Then it is the whole of one.
        forced: was it cut from the next one where nothing invited a cut, perhaps inside a word?
    """

    text: str
    start: int
    end: int
    pause: float
    boundary: Boundary
    tokens: float
    spans: tuple[Span, ...]
    paragraph: int
    chapter: int
    heading: bool = False
    forced: bool = False

    @property
    def sentences(self) -> range:
        """Numbers of the sentences that it holds, in part or whole."""
        return range(self.spans[0].sentence, self.spans[-1].sentence + 1)

    @property
    def seconds(self) -> float:
        """Estimated seconds of speech, without the pause."""
        return self.tokens / 25
