"""A book read into a file, which may be interrupted anywhere and goes on where it was.

The book is cut (``text``), said in waves of pieces (``LongText.say``), and each piece is levelled, marked and kept in
a folder beside the output (``PartsFolder``). A wave is done as a whole or not at all, so that whatever is computed
together is so again after an interruption, and the file is the same to the bit. The file is put together at the end,
piece by piece. In memory are the bytes of the book and one wave.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import InvalidRequestError, UnavailablePassError
from ..text import Piece, pieces
from .book import Book, Survey
from .files import as_16_bit, audio_format, audio_written, read_piece, write_json, written
from .long_text import SLOTS, WAVES, LongText, joined, marked
from .parts import RESTART, PartsFolder
from .pipeline import Pipeline
from .subtitles import Format, cues, written_as

WAVE = SLOTS * WAVES  # pieces that are done together
NO_WORDS = "Leave words out (--words): sentences have their shares of the speech."
SAMPLED = 8  # numbers of each parameter that tell one model from another


@dataclass(frozen=True)
class ReadingProgress:
    """How far a reading is: pieces and estimated speech tokens, of all; seconds of speech so far."""

    pieces: int
    all_pieces: int
    tokens: float
    all_tokens: float
    seconds: float


@dataclass(frozen=True)
class BookReport:
    """What a reading has made.

    Attributes:
        files: audio, one a chapter or one.
        chapters: of the file with the times of chapters, or ``None``.
        subtitles: beside each of ``files``; none where they were not asked for.
        seconds: of speech, pauses included.
        pieces: as they were said; those that reached their limit were cut into several.
        resumed: of those, how many an earlier run had said.
        retried: how many were said again and are right; ``faulty``: those that stayed wrong, with what is wrong.
        said: seconds of speech that this run said, in ``elapsed`` seconds.
    """

    files: tuple[Path, ...]
    chapters: Path | None
    seconds: float
    pieces: int
    resumed: int
    retried: int
    faulty: tuple[str, ...]
    said: float
    elapsed: float
    subtitles: tuple[Path, ...] = ()

    @property
    def real_time_factor(self) -> float | None:
        """Seconds for one of speech, in this run; ``None`` where it said nothing."""
        return self.elapsed / self.said if self.said else None


class Reading:
    """One book, one output.

    Args:
        working: the model for the body of a ``with``, as a pipeline.
        config: what the model is optimized with, as JSON.
        seed: of the first piece; the others follow.
        chapters: one file a chapter (``book-01.flac``) in place of one for all.
        restart: drop what an earlier run has kept, and overwrite what it made.
        keep_parts: leave the folder of pieces where it is.
        subtitles: ``srt`` or ``vtt``: times of sentences beside the audio; ``words``: of words too.
        arguments: of ``generate``, and optionally ``voice``.

    Raises:
        InvalidRequestError: the book cannot be read, the format of the output cannot be written; there are to be words
            without subtitles.
    """

    def __init__(
        self,
        working: Callable[[], AbstractContextManager[Pipeline]],
        config: Mapping[str, Any],
        book: Book,
        output: Path,
        *,
        seed: int,
        chapters: bool,
        restart: bool,
        keep_parts: bool,
        subtitles: Format | None,
        words: bool,
        progress: Callable[[ReadingProgress], None],
        arguments: Mapping[str, Any],
    ):
        audio_format(output)
        if words and subtitles is None:
            raise InvalidRequestError("Times of words are written into subtitles.", "", 'Add subtitles="srt" or "vtt".')
        self._words = words
        self._working, self._config = working, config
        self._book, self._output, self._seed = book, output, seed
        self._by_chapter, self._restart, self._keep_parts = chapters, restart, keep_parts
        self._subtitles, self._progress, self._arguments = subtitles, progress, dict(arguments)
        self._parts = PartsFolder(output.with_name(f"{output.name}.parts"))
        self._pipeline: Pipeline | None = None
        self._rate = 0

    def run(self) -> BookReport:
        """Read what is left of it, and put the file together.

        Raises:
            InvalidRequestError: the book has nothing to say or is in another encoding; the output exists; the pieces
                that are kept are of another reading, or have no times of words.
            UnavailablePassError: the words of this model have no times.
            TurboError: there is no room to write. What is finished is kept.
        """
        start = time.perf_counter()
        with self._working() as pipeline:
            self._pipeline, self._rate = pipeline, pipeline.parts.model.sr
            if self._words and pipeline.unaligned:
                raise UnavailablePassError(
                    "Words have no times.", f"{pipeline.unaligned[0].upper()}{pipeline.unaligned[1:]}.", NO_WORDS
                )
            long = LongText(pipeline)
            language = self._arguments.get("language_id")

            def cut() -> Iterator[Piece]:
                return pieces(self._book.text(), language, splitting=long.splitting)

            survey = self._book.survey(cut())
            first = next(cut())
            asked = pipeline.utterance(0, {**self._arguments, "text": first.text, "seed": self._seed})
            identity = self._identity(pipeline, asked.voice)
        with self._parts.held():
            self._refuse_existing(survey)
            if self._restart:
                self._parts.empty()
            self._parts.begin(identity)
            waves = self._parts.waves()
            if self._words and any("words" not in one for wave in waves for one in wave):
                raise InvalidRequestError(
                    f"{self._parts.path} holds pieces without times of words.",
                    "They were said without subtitles.",
                    f"{RESTART} Or leave the words out.",
                )
            resumed = sum(map(len, waves))
            said = self._say(cut(), asked.given, asked.voice, waves, survey)
            files, marks, lines = self._assemble(waves)
            report = self._report(files, marks, waves, resumed, said, time.perf_counter() - start)
            report = replace(report, subtitles=lines)
            if not self._keep_parts:
                self._parts.remove()
            return report

    def _say(
        self, parts: Iterator[Piece], given: Mapping[str, Any], voice: Any, waves: list[Any], survey: Survey
    ) -> float:
        """Add the waves that are missing; seconds of speech that they have."""
        done, tokens, said = 0, 0.0, 0.0
        heard = [one["loudness"] for wave in waves for one in wave if one["loudness"] is not None]
        number, kept, seconds = 0, len(waves), self._seconds(waves)

        def tell() -> None:
            self._progress(ReadingProgress(done, survey.pieces, tokens, survey.tokens, seconds + said))

        while wave := list(islice(parts, WAVE)):
            if number == kept:
                tell()
            if number >= kept:
                waves.append(self._parts.keep(number, self._said(wave, given, voice, done, heard), self._rate))
                said += self._seconds(waves[-1:])
            number, done = number + 1, done + len(wave)
            tokens += sum(piece.tokens for piece in wave)
            if number > kept:
                tell()
        return said

    def _said(
        self, wave: Sequence[Piece], given: Mapping[str, Any], voice: Any, first: int, heard: list[float]
    ) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Samples (n,) int16 of each piece, marked, with the pause behind it; and what is known of it."""
        result = []
        with self._working() as pipeline:
            if pipeline is not self._pipeline:
                raise UnavailablePassError("The model's configuration has changed while it read.")
            level = pipeline.engines.text.loudness
            reader = LongText(pipeline, timed=self._subtitles is not None)
            for one in reader.say(wave, dict(given), voice, self._seed + first):
                count = len(heard)
                block = torch.cat(list(joined([one], self._rate, level, heard)))
                samples = torch.cat(list(marked([block], pipeline.stages.watermark)))
                known = {
                    "text": one.piece.text,
                    "start": one.piece.start,
                    "end": one.piece.end,
                    "chapter": one.piece.chapter,
                    "heading": one.piece.heading,
                    "pause": one.piece.pause,
                    "tokens": one.tokens,
                    "attempts": one.attempts,
                    "faults": one.faults,
                    "loudness": heard[-1] if len(heard) > count else None,
                }
                if one.words is not None:
                    known["words"] = one.words
                result.append((as_16_bit(samples.numpy()), known))
        return result

    def _identity(self, pipeline: Pipeline, voice: Any) -> dict[str, Any]:
        """What must be the same for pieces to be parts of one reading, as JSON."""
        arguments = {name: value for name, value in self._arguments.items() if name != "voice"}
        recording = arguments.pop(pipeline.stages.reference, None)
        return {
            "book": self._book.digest,
            "encoding": self._book.encoding,
            "seed": self._seed,
            "voice": _digest(Path(recording).read_bytes() if isinstance(recording, str | Path) else voice),
            "arguments": arguments,
            "model": type(pipeline.parts.model).__name__,
            "weights": _digest(_sampled(pipeline.parts.modules())),
            "device": str(pipeline.parts.device),
            "configuration": self._config,
            "wave": WAVE,
            "chatterbox_turbo": __version__,
            "torch": torch.__version__,
        }

    def _outputs(self, chapters: Sequence[int]) -> list[Path]:
        if not self._by_chapter:
            return [self._output]
        name = self._output
        return [name.with_name(f"{name.stem}-{chapter:02d}{name.suffix}") for chapter in chapters]

    def _refuse_existing(self, survey: Survey) -> None:
        existing = [path for path in self._outputs(survey.chapters) if path.exists()]
        if existing and not self._parts.started and not self._restart:
            raise InvalidRequestError(
                f"{existing[0]} exists already.", "", "Name another output, or read it again with --restart."
            )

    def _assemble(self, waves: list[Any]) -> tuple[tuple[Path, ...], Path | None, tuple[Path, ...]]:
        """The audio files, piece by piece, the times of chapters where there are any, and those of sentences."""
        known = [one for wave in waves for one in wave]
        chapters = list(dict.fromkeys(one["chapter"] for one in known))
        groups = [known] if not self._by_chapter else [[o for o in known if o["chapter"] == c] for c in chapters]
        files = self._outputs(chapters)
        for path, group in zip(files, groups, strict=True):
            with audio_written(path, self._rate, sum(one["samples"] for one in group)) as write:
                for one in group:
                    write(read_piece(self._parts.path / one["file"]))
        lines = tuple(self._titled(path, group) for path, group in zip(files, groups, strict=True) if self._subtitles)
        if self._by_chapter or len(chapters) < 2:
            return tuple(files), None, lines
        marks = self._output.with_name(f"{self._output.stem}.chapters.json")
        write_json(marks, _times(known, self._rate))
        return tuple(files), marks, lines

    def _titled(self, audio: Path, group: Sequence[Mapping[str, Any]]) -> Path:
        path = audio.with_suffix(f".{self._subtitles}")
        found = cues(group, self._rate, self._arguments.get("language_id"))
        with written(path) as file:
            file.write(written_as(found, self._subtitles, self._words).encode())
        return path

    def _seconds(self, waves: list[Any]) -> float:
        return sum(one["samples"] for wave in waves for one in wave) / self._rate

    def _report(
        self, files: tuple[Path, ...], marks: Path | None, waves: list[Any], resumed: int, said: float, elapsed: float
    ) -> BookReport:
        known = [one for wave in waves for one in wave]
        faulty = [one for one in known if len(one["faults"]) >= one["attempts"]]
        retried = [one for one in known if 0 < len(one["faults"]) < one["attempts"]]
        told = tuple(f"{one['faults'][-1]}: {one['text'][:60]!r}" for one in faulty)
        return BookReport(files, marks, self._seconds(waves), len(known), resumed, len(retried), told, said, elapsed)


def _times(known: Sequence[Mapping[str, Any]], rate: int) -> list[dict[str, Any]]:
    """Number, title, start and end in seconds of each chapter."""
    found: list[dict[str, Any]] = []
    at = 0
    for one in known:
        if not found or found[-1]["chapter"] != one["chapter"]:
            title = one["text"] if one["heading"] else ""
            found.append({"chapter": one["chapter"], "title": title, "start": round(at / rate, 3)})
        at += one["samples"]
        found[-1]["end"] = round(at / rate, 3)
    return found


def _sampled(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The first numbers of each parameter."""
    found = {}
    for part, module in modules.items():
        for name, value in module.named_parameters():
            if value.numel() and not value.is_meta:
                found[f"{part}.{name}"] = value.detach()[(0,) * (value.dim() - 1)].reshape(-1)[:SAMPLED]
    return found


def _digest(value: Any) -> str:
    """SHA-256 of bytes, numbers, tensors, and of dicts, lists and objects of them."""
    digest = hashlib.sha256()

    def add(one: Any) -> None:
        if isinstance(one, bytes):
            digest.update(one)
        elif isinstance(one, Tensor):
            digest.update(f"{one.dtype}{tuple(one.shape)}".encode())
            digest.update(one.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(one, Mapping):
            for key in sorted(one, key=str):
                digest.update(str(key).encode())
                add(one[key])
        elif isinstance(one, list | tuple):
            for part in one:
                add(part)
        elif hasattr(one, "__dict__"):
            add(vars(one))
        else:
            digest.update(repr(one).encode())

    add(value)
    return digest.hexdigest()
