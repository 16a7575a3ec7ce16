"""What ``model.turbo`` can say: with times, in batches, series, streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..budget.measurement import slots_within
from ..errors import InvalidRequestError, UnavailablePassError
from ..runtime.arguments import whole
from ..runtime.s3gen.streaming import Windows
from .batch import WAVES, one_by_one, speak_batch
from .book import Book
from .long_text import LongText
from .pipeline import Pipeline
from .reading import BookReport, Reading, ReadingProgress
from .stream import SpeechStream
from .subtitles import Format
from .times import TimedSpeech

SLOTS = 8  # utterances decoded at once of a series without an end


class Speaker:
    """Several ways to speak with one optimized model, for its handle.

    What a handle has: ``plan``, ``config``, ``token_model``, and ``_working``, the model for a body as it is now.
    """

    _pipeline: Pipeline | None  # where upstream's stages are known
    _unknown: str  # why they are not

    def _working(self, name: str, look: bool = True) -> AbstractContextManager[Any]:
        raise NotImplementedError

    def timed(self, text: str, *, seed: int | None = None, **arguments: Any) -> TimedSpeech:
        """Speech, with the times of its sentences, and of its words where the family of the model has an alignment.

        The samples are those of ``generate`` after ``torch.manual_seed(seed)``. Words have times where upstream's
        analyzer is (Multilingual up to chatterbox-tts 0.1.7), by the attention that it looks at; elsewhere sentences
        have their shares of the speech, as ``Sentence.source`` says. docs/subtitles.md has what is known of either.

        Args:
            seed: of all random numbers; drawn from the global generator where it is missing.
            arguments: of ``generate``, and optionally ``voice``.

        Raises:
            UnavailablePassError: the decoding pass does not run on this model, or the code of its ``generate`` is not
                known.
        """
        given = {"text": text, **arguments} if seed is None else {"text": text, "seed": seed, **arguments}
        (speech,) = self.batch([given], times=True)
        return speech

    def batch(
        self,
        items: Sequence[Mapping[str, Any]],
        slots: int | None = None,
        return_exceptions: bool = False,
        times: bool = False,
    ) -> list[Tensor]:
        """Several utterances at once, each as it would be alone with the same seed.

        Tokens are decoded in one batch that utterances enter and leave while it runs. Audio is made in batches of
        similar length (``flow.batch_frames``), or one by one where the passes flow and vocoder do not run.

        Where the code of this model's ``generate`` is not known (the report says so), one after the other by that.

        Args:
            items: keyword arguments of ``generate``, and optionally ``seed`` (drawn from the global generator where
                it is missing) and ``voice`` (a name in ``voices``, or conditionals; the model's own where it is
                missing).
            slots: utterances decoded at once, which bounds the memory of their caches; all by default, or
                ``budget_slots`` where there is a budget.
            return_exceptions: what an item fails with takes its place in the list, and the others go on.
            times: ``TimedSpeech`` in place of samples, as of ``timed``.

        Returns:
            Samples (1, m) of each item, in order. The model's own voice and the random generators' states are
            what they were.

        Raises:
            UnavailablePassError: the decoding pass does not run on this model; or, with ``times``, the code of its
                ``generate`` is not known.
            InvalidRequestError: an item has no text or no voice, or an unknown one, or ``slots`` is below 1 or above
                ``budget_slots``.
        """
        self._require("Batches", "call generate for each item")
        items = list(items)
        results: list[Any] = [None] * len(items)
        with self._working("batch") as now:
            for number, result in now._spoken(items, self._slots(slots), None, not return_exceptions, times):
                results[number] = result
        return results

    def as_completed(
        self,
        items: Iterable[Mapping[str, Any]],
        slots: int | None = None,
        return_exceptions: bool = True,
        times: bool = False,
    ) -> Iterator[tuple[int, Tensor | TimedSpeech | Exception]]:
        """As ``batch``, but (number, samples) one after the other, as they are finished, of any number of items.

        ``items`` are read as they are needed, and no more than four for each slot (8, where ``slots`` is not given) are
        in memory. The model is free for other threads between two results.

        Raises:
            UnavailablePassError: as ``batch``; or the model's configuration has changed meanwhile.
        """
        self._require("Batches", "call generate for each item")
        slots = self._slots(slots) or SLOTS
        work: Iterator[Any] | None = None
        while True:
            with self._working("batch") as now:
                if work is None:
                    first, work = now, now._spoken(items, slots, slots * WAVES, not return_exceptions, times)
                if now is not first:
                    raise UnavailablePassError("The model's configuration has changed while its batch ran.")
                result = next(work, None)
            if result is None:
                return
            yield result

    def _spoken(
        self, items: Iterable[Any], slots: int | None, together: int | None, raising: bool, times: bool
    ) -> Iterator[Any]:
        if self._pipeline is None and times:
            raise UnavailablePassError("Speech of this model has no times.", f"{self._unknown}.", "Call generate.")
        if self._pipeline is None:
            return one_by_one(self._parts(), items, self.voices.chosen, raising)
        return speak_batch(self._pipeline, items, slots, together, raising, times)

    def _slots(self, slots: int | None) -> int | None:
        if slots is not None and slots < 1:
            raise InvalidRequestError(f"slots is {slots}, but must be at least 1.")
        return slots_within(self.config, slots)

    def stream(
        self,
        text: str | Iterable[str] | None = None,
        *,
        seed: int | None = None,
        windows: Windows | None = None,
        **arguments: Any,
    ) -> SpeechStream:
        """Speech block by block, to be heard while it is made: an iterator, also an asynchronous one.

        Tokens are those of ``generate`` with the same seed. Several streams share T3's batch (``decoding.streams`` at
        once), the encoded voice is read once, and one watermark spans the whole. Close the stream, or use it in a
        ``with``, where not all of it is wanted.

        Args:
            text: what is said, in pieces where it is too long to be said at once; several texts are said one after the
                other, the next one's tokens being decoded while one is heard. Voice conversion has ``audio`` instead,
                whose blocks are converted one after the other.
            seed: of all random numbers; each further text or piece has the next one. Drawn from the global generator
                where it is missing.
            windows: how it is cut (``Windows``: ``first_chunk``, ``chunk``, ``context``, ...).
            arguments: of ``generate``, and optionally ``voice``.

        Yields:
            (samples (1, m) float32 on the host, ``StreamMetrics``).

        Raises:
            UnavailablePassError: the decoding pass or the vocoder pass does not run, or the code of this model's
                ``generate`` is not known.
        """
        if self._pipeline is None and not self._unknown:
            raise UnavailablePassError("This configuration has been reverted.", "", "Apply it again.")
        if self._pipeline is None:
            raise UnavailablePassError("This model cannot stream.", f"{self._unknown}.", "Call generate.")
        if self._pipeline.alone:
            raise UnavailablePassError("This model cannot stream.", f"{self._pipeline.alone}.", "Call generate.")
        if self._pipeline.engines.vocoder is None:
            step = self.plan.step("vocoder")
            raise UnavailablePassError("Streams need the vocoder pass.", f"It is {step.status}: {step.reason}.", "")
        if self._pipeline.parts.t3 is not None:
            self._require("Streams", "call generate")
        seed = int(torch.randint(2**62, ())) if seed is None else whole("seed", seed)
        arguments = {**self.voices.chosen(arguments)}  # one voice for all pieces, whatever becomes of its name
        if text is None:
            return SpeechStream(self._streaming, [{"seed": seed, **arguments}], windows)
        texts = [text] if isinstance(text, str) else text
        parts = ((part, pause) for one in texts for part, pause in self._parts_of(one, arguments))
        items = (
            {"seed": seed + number, "text": part, "pause": pause, **arguments}
            for number, (part, pause) in enumerate(parts)
        )
        return SpeechStream(self._streaming, items, windows)

    def read(
        self,
        book: str | PathLike,
        output: str | PathLike,
        *,
        seed: int = 0,
        encoding: str = "utf-8",
        chapters: bool = False,
        restart: bool = False,
        keep_parts: bool = False,
        subtitles: Format | None = None,
        words: bool = False,
        progress: Callable[[ReadingProgress], None] | None = None,
        **arguments: Any,
    ) -> BookReport:
        """Read a text file of any length into an audio file; the same call goes on after an interruption.

        Pieces that are finished lie in a folder beside the output (``book.flac.parts``), and the output is the same to
        the bit as without an interruption, on the same machine with as many threads. In memory are the bytes of the
        book and 16 pieces. The model is free for other threads between two waves of so many.

        Args:
            output: ``.wav``, ``.flac``, ``.opus`` or ``.ogg`` (Opus). Where the book has chapters, their times are
                written beside it (``book.chapters.json``).
            seed: of the first piece; the others follow.
            encoding: of the book; a byte order mark of UTF-8 is passed over.
            chapters: one file for each (``book-01.flac``) in place of one for all.
            restart: drop what an earlier run has kept, and overwrite what it made.
            keep_parts: leave the folder of pieces where it is.
            subtitles: ``srt`` or ``vtt``: times of sentences, beside the audio.
            words: of words too, where the family of the model has them (``timed``): a cue a word in SubRip, times in
                the lines in WebVTT.
            progress: called before the first wave, and after each.
            arguments: of ``generate``, and optionally ``voice``.

        Raises:
            UnavailablePassError: the passes decoding and text do not run on this model, or its words have no times.
            InvalidRequestError: the book has nothing to say or is in another encoding; the output exists, or what an
                earlier run has kept is of another reading, or has no times; ``words`` without ``subtitles``.
            TurboError: the disk is full; what is finished is kept.

        Warns:
            RunawayWarning: a piece went wrong.
        """
        self._require("Readings", "call generate with parts of the text")
        if self._pipeline is None or self._pipeline.engines.text is None:
            step = self.plan.step("text")
            reason = self._unknown or f"It is {step.status}: {step.reason}"
            raise UnavailablePassError("Readings need the text pass.", f"{reason}.", "Set text.enabled = true.")
        config = self.config.model_dump()
        config.get("decoding", {}).pop("progress", None)
        reading = Reading(
            self._reading,
            config,
            Book(Path(book), encoding),
            Path(output),
            seed=whole("seed", seed),
            chapters=chapters,
            restart=restart,
            keep_parts=keep_parts,
            subtitles=subtitles,
            words=words,
            progress=progress or (lambda _: None),
            arguments=arguments,
        )
        return reading.run()

    @contextmanager
    def _reading(self) -> Iterator[Pipeline]:
        with self._working("read") as now:
            yield now._pipeline

    def _parts_of(self, text: str, arguments: Mapping[str, Any]) -> list[tuple[str, float]]:
        """A text, or its pieces where it is too long to be said at once, each with the pause behind it."""
        if self._pipeline.engines.text is None or not isinstance(text, str):
            return [(text, 0.0)]
        pieces = LongText(self._pipeline).needed({**arguments, "text": text})
        return [(piece.text, piece.pause) for piece in pieces] or [(text, 0.0)]

    @contextmanager
    def _streaming(self, look: bool = True) -> Iterator[Pipeline]:
        with self._working("stream", look) as now:
            yield now._pipeline

    def _require(self, what: str, instead: str) -> None:
        step = self.plan.step("decoding")
        if step.status != "on":
            raise UnavailablePassError(
                f"{what} need the decoding pass.",
                f"On this model it is {step.status}: {step.reason}.",
                f"Enable it, or {instead}.",
            )
