"""When each sentence of a reading is heard: subtitles beside its audio.

A piece's beginning and end are known to the sample. Inside a piece the time of a sentence is its share of the piece's
speech by the estimate of its length (``text.estimate``), so that it may be off by a part of a piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..text import split

Format = Literal["srt", "vtt"]
TARGET, LONGEST = 3.0, 6.0  # seconds that a line is on the screen


@dataclass(frozen=True)
class Cue:
    """A line: seconds from the beginning of the audio, and what is said."""

    start: float
    end: float
    text: str


def cues(pieces: Iterable[Mapping[str, Any]], rate: int, language: str | None = None) -> Iterator[Cue]:
    """Lines of pieces that follow each other.

    Args:
        pieces: each with ``text``, ``samples`` (with the pause behind it) and ``pause`` in seconds.
        rate: samples a second.
    """
    at = 0.0
    for piece in pieces:
        length = piece["samples"] / rate
        lines = split(piece["text"], language, target=TARGET, longest=LONGEST, shortest=0.0)
        total = sum(line.tokens for line in lines)
        speech, begin = max(0.0, length - piece["pause"]), at
        for line in lines:
            end = begin + speech * line.tokens / total
            yield Cue(begin, end, line.text)
            begin = end
        at += length


def written_as(lines: Iterable[Cue], form: Format) -> str:
    """The content of a SubRip (``srt``) or WebVTT (``vtt``) file."""
    blocks = ["WEBVTT"] if form == "vtt" else []
    point = "." if form == "vtt" else ","
    for number, cue in enumerate(lines, 1):
        # what begins a tag or an entity in WebVTT
        text = cue.text.replace("&", "&amp;").replace("<", "&lt;") if form == "vtt" else cue.text
        blocks.append(f"{number}\n{_clock(cue.start, point)} --> {_clock(cue.end, point)}\n{text}")
    return "\n\n".join(blocks) + "\n"


def _clock(seconds: float, point: str) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"
