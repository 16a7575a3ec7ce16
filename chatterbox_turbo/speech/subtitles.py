"""Subtitles beside the audio of a reading: when each sentence is heard, or each word (``times``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from .times import Sentence, sentences

Format = Literal["srt", "vtt"]
TARGET, LONGEST = 3.0, 6.0  # seconds that a line is on the screen


def cues(pieces: Iterable[Mapping[str, Any]], rate: int, language: str | None = None) -> Iterator[Sentence]:
    """Lines of pieces that follow each other; arguments as those of ``times.sentences``."""
    return sentences(pieces, rate, language, TARGET, LONGEST)


def written_as(lines: Iterable[Sentence], form: Format, words: bool = False) -> str:
    """The content of a SubRip (``srt``) or WebVTT (``vtt``) file.

    Args:
        words: SubRip has a cue for each word, WebVTT the time of each word in its line. Lines without words stay lines.
    """
    blocks = ["WEBVTT"] if form == "vtt" else []
    point = "." if form == "vtt" else ","
    each = (one for line in lines for one in ((line.words or (line,)) if words and form == "srt" else (line,)))
    for number, cue in enumerate(each, 1):
        text = cue.text
        if form == "vtt":
            text = _tagged(cue) if words else _escaped(text)
        blocks.append(f"{number}\n{_clock(cue.start, point)} --> {_clock(cue.end, point)}\n{text}")
    return "\n\n".join(blocks) + "\n"


def _escaped(text: str) -> str:
    """Without what begins a tag or an entity in WebVTT."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _tagged(line: Sentence) -> str:
    """The text of a line with the time before each word but the first.

    Times in a cue have to grow, and to lie inside it, so that of several words within a millisecond one has a time.
    """
    parts, at, time = [], 0, _thousandths(line.start)
    for word in line.words:
        begin = line.text.find(word.text, at)
        if begin < 0:
            continue
        parts.append(_escaped(line.text[at:begin]))
        if time < _thousandths(word.start) < _thousandths(line.end):
            time = _thousandths(word.start)
            parts.append(f"<{_clock(word.start, '.')}>")
        parts.append(_escaped(word.text))
        at = begin + len(word.text)
    return "".join(parts) + _escaped(line.text[at:])


def _thousandths(seconds: float) -> int:
    return round(seconds * 1000)


def _clock(seconds: float, point: str) -> str:
    minutes, rest = divmod(_thousandths(seconds), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"
