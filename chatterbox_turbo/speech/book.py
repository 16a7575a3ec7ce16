"""A text file of any length: what its bytes mean, and the pieces that it is spoken in."""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidRequestError, brief
from ..text import Piece

BLOCK = 1 << 16  # characters read at once
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
OTHER = "Name its encoding: --encoding cp1252, latin-1, utf-16, gb18030, ..."
_FOREIGN = {b"%PDF": "a PDF file", b"PK\x03\x04": "a ZIP archive, as EPUB and DOCX files are", b"{\\rtf": "an RTF file"}


@dataclass(frozen=True)
class Survey:
    """What is in a book, found out before it is spoken.

    Attributes:
        tokens: speech tokens that all pieces are estimated to take.
        chapters: numbers of the chapters that have something to say.
    """

    pieces: int
    tokens: float
    chapters: tuple[int, ...]


class Book:
    """A text file, whose bytes are held; its text is decoded block by block.

    Args:
        encoding: as Python calls it; a byte order mark of UTF-8 is passed over.

    Raises:
        InvalidRequestError: the file cannot be read, or there is no such encoding.
    """

    def __init__(self, path: Path, encoding: str = "utf-8"):
        self.path, self.encoding = path, encoding
        try:
            codec = codecs.lookup(encoding).name
        except LookupError:
            raise InvalidRequestError(
                f"There is no encoding {brief(encoding)}.", "", "Use utf-8, cp1252, latin-1, utf-16, gb18030, ..."
            ) from None
        self._codec = "utf-8-sig" if codec == "utf-8" else codec
        try:
            self._data = path.read_bytes()
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be read: {error.strerror or error}.") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self._data).hexdigest()

    def text(self) -> Iterator[str]:
        """The text in blocks, line ends as ``\\n``.

        Raises:
            InvalidRequestError: the file is in another encoding, or is no text.
        """
        for mark, kind in _FOREIGN.items():
            if self._data.startswith(mark):
                raise InvalidRequestError(f"{self.path} is {kind}.", "", "Save it as plain text.")
        if self._data.startswith(_UTF_16) and self._codec == "utf-8-sig":
            raise InvalidRequestError(f"{self.path} is in UTF-16, not in UTF-8.", "", "Say so: --encoding utf-16.")
        count = 0
        with io.TextIOWrapper(io.BytesIO(self._data), encoding=self._codec) as file:
            try:
                while block := file.read(BLOCK):
                    if "\0" in block:
                        raise InvalidRequestError(
                            f"{self.path} is no text in {self.encoding}.", "It has zero characters.", OTHER
                        )
                    count += len(block)
                    yield block
            except UnicodeError as error:
                reason = getattr(error, "reason", error)
                raise InvalidRequestError(
                    f"{self.path} is not in {self.encoding}.", f"After character {count:,}: {reason}.", OTHER
                ) from error

    def survey(self, pieces: Iterable[Piece]) -> Survey:
        """Count the pieces of this book.

        Raises:
            InvalidRequestError: there are none.
        """
        count, tokens = 0, 0.0
        chapters: list[int] = []
        for piece in pieces:
            count, tokens = count + 1, tokens + piece.tokens
            if piece.chapter not in chapters[-1:]:
                chapters.append(piece.chapter)
        if not count:
            raise InvalidRequestError(f"{self.path} has nothing that can be said.", "", "It needs letters or digits.")
        return Survey(count, tokens, tuple(chapters))
