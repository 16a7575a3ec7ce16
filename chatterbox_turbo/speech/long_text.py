"""Texts that are too long to be said at once: in pieces, each looked at, joined into one speech.

Pieces are cut by ``chatterbox_turbo.text``, decoded side by side, and heard in order. A piece that went wrong is said
again with another seed; one that reached its own limit is cut into smaller ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidRequestError, RunawayWarning
from ..passes.token_model import UPSTREAMS_LIMIT
from ..runtime.voice.marking import MarkStream
from ..text import Piece, Splitting, estimate_tokens, pieces, split
from .pipeline import Pipeline
from .times import Times, times_of
from .utterance import Draws, Utterance

SLOTS = 8  # pieces decoded at once
WAVES = 2  # pieces in memory for each of them
FULL = 0.9  # of what the model can say at once: a text that is estimated to take more is cut
LOOSE, SLACK = 3.0, 75  # a piece has at most so many times its estimate, and so many tokens
MISSING = 0.2  # of its estimate: less is too little
PERIOD, REPEATS = 8, 10  # so many equal runs of up to so many tokens at the end of a piece are no speech
DEPTH = 3  # how often a piece is cut again
APART = 1_000_003  # from one seed of a piece to the next
FADE = 0.01  # seconds, at the end of a piece; its start is faded in by the model
LEVELED = 3.0  # dB
GATE, BLOCK = -40.0, 0.05  # dB below the loudest block of so many seconds: pauses do not count


@dataclass
class Spoken:
    """A piece that was said.

    Attributes:
        samples: (n,) at the model's rate, not marked, without the pause behind it.
        attempts: how often it was said.
        faults: what was wrong with those before, and with this one where it is the last.
        words: the times of its words, where they were asked for and the family of the model has them.
    """

    piece: Piece
    samples: Tensor
    tokens: int
    attempts: int = 1
    faults: list[str] = field(default_factory=list)
    words: list[Times] | None = None


class LongText:
    """Cuts texts, and says them through a pipeline; the caller holds the model's lock.

    Args:
        pipeline: with ``engines.text``, the options.
        timed: keep the times of words of what is said.
    """

    def __init__(self, pipeline: Pipeline, timed: bool = False):
        self._pipeline, self._section, self._timed = pipeline, pipeline.engines.text, timed
        self._slots = min(SLOTS, pipeline.slots or SLOTS)
        self.splitting = splitting_of(self._section)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``Pipeline.generate``, of a text of any length."""
        stages = self._pipeline.stages
        given = stages.bind(args, kwargs)
        voice = stages.condition(given)
        parts = self.needed(given)
        if len(parts) < 2:
            return self._pipeline.spoken({**given, "text": parts[0].text} if parts else given, voice)
        # drawn from the global generator, so that torch.manual_seed repeats it
        said = self.say(parts, given, voice, int(torch.randint(2**62, ())))
        return _whole(self.sound(said))[None]

    def sound(self, said: Iterable[Spoken]) -> Iterator[Tensor]:
        """Marked samples (n,) of pieces, joined, in blocks."""
        return marked(
            joined(said, self._pipeline.parts.model.sr, self._section.loudness), self._pipeline.stages.watermark
        )

    def needed(self, given: dict[str, Any]) -> list[Piece]:
        """The pieces of a text that cannot be said at once, or of any where words take the place of numbers."""
        text, language = given["text"], given.get("language_id")
        engine = self._pipeline.engines.token_model
        limit = UPSTREAMS_LIMIT if engine is None else engine.longest
        if fits(text, language, limit) and not self._section.normalize:
            return []
        return self.cut([text], language)

    def cut(self, lines: Iterable[str], language: str | None) -> list[Piece]:
        """All pieces of a text.

        Raises:
            InvalidRequestError: there is nothing to say.
        """
        found = list(pieces(lines, language, splitting=self.splitting))
        if not found:
            raise InvalidRequestError("The text has nothing that can be said.", "", "Pass letters or digits.")
        return found

    def say(self, parts: Iterable[Piece], given: dict[str, Any], voice: Any, seed: int) -> Iterator[Spoken]:
        """All pieces in order; a few of them are in memory at a time.

        Args:
            given: arguments of ``generate``; each piece's text takes the place of theirs.
            seed: of the first piece; the others follow.
        """
        rest = enumerate(parts)
        while wave := list(islice(rest, self._slots * WAVES)):
            tries = [_Try(piece, seed + number) for number, piece in wave]
            tries = self._decoded(tries, given, voice)
            samples: dict[int, Tensor] = {}
            for some in self._pipeline.alike([one.utterance for one in tries]):
                for utterance, wav in zip(some, self._pipeline.sound(some), strict=True):
                    samples[id(utterance)] = wav[0, : self._pipeline.stages.crop(utterance.tokens.size(-1))]
            for one in tries:
                wav = samples.pop(id(one.utterance))
                if not bool(wav.abs().max() > 0):
                    one.faults.append("silence")
                if one.faults:
                    _tell(one)
                words = times_of(one.utterance, len(wav), self._pipeline.parts.model.sr)
                yield Spoken(one.piece, wav, one.utterance.tokens.size(-1), one.attempts, one.faults, words)

    def _decoded(self, tries: list[_Try], given: dict[str, Any], voice: Any) -> list[_Try]:
        """With tokens; those that went wrong again, as often as the options allow."""
        waiting = list(tries)
        for attempt in range(self._section.retries + 1):
            for one in waiting:
                one.begin(self._pipeline, given, voice, attempt, self._timed)
            self._pipeline.decode([one.utterance for one in waiting], self._slots, told=False)
            waiting = [one for one in waiting if one.wrong()]
            smaller = {id(one): self._smaller(one, given) for one in waiting if one.utterance.end == "limit"}
            smaller = {key: parts for key, parts in smaller.items() if len(parts) > 1}
            if smaller:
                waiting = [one for one in waiting if id(one) not in smaller]
                decoded = {key: self._decoded(parts, given, voice) for key, parts in smaller.items()}
                tries = [part for one in tries for part in decoded.get(id(one), [one])]
            if not waiting:
                break
        return tries

    def _smaller(self, one: _Try, given: dict[str, Any]) -> list[_Try]:
        """A piece that reached its limit, in parts."""
        if one.depth >= DEPTH:
            return []
        half = max(0.5, one.piece.seconds / 2)
        whole, pauses = one.piece, self.splitting.pauses
        cut = split(whole.text, given.get("language_id"), target=half, longest=half, shortest=0.0, pauses=pauses)
        if len(cut) < 2:
            return []
        fault = f"{one.faults[-1]}: cut into {len(cut)}"
        # where they lie in the whole text, but for what is said otherwise than it is written
        ends = [min(whole.start + part.end, whole.end) for part in cut[:-1]] + [whole.end]
        parts = [
            replace(part, start=start, end=end, paragraph=whole.paragraph, chapter=whole.chapter, heading=whole.heading)
            for part, start, end in zip(cut, [whole.start, *ends[:-1]], ends, strict=True)
        ]
        parts[-1] = replace(parts[-1], pause=whole.pause, boundary=whole.boundary)
        return [
            _Try(part, one.seed + (number + 1) * 7919, one.depth + 1, [*one.faults[:-1], fault], one.attempts)
            for number, part in enumerate(parts)
        ]


@dataclass
class _Try:
    """A piece on its way to tokens."""

    piece: Piece
    seed: int
    depth: int = 0
    faults: list[str] = field(default_factory=list)
    attempts: int = 0
    utterance: Utterance | None = None

    def begin(self, pipeline: Pipeline, given: dict[str, Any], voice: Any, attempt: int, timed: bool) -> None:
        draws = Draws(pipeline.parts.device, (self.seed + APART * attempt) % 2**63)
        limit = int(LOOSE * self.piece.tokens) + SLACK
        self.utterance = Utterance(self.attempts, {**given, "text": self.piece.text}, voice, draws, limit, timed=timed)
        self.attempts += 1

    def wrong(self) -> bool:
        """Whether it went wrong; what was is in ``faults``."""
        count, expected = self.utterance.tokens.size(-1), self.piece.tokens
        if self.utterance.end == "limit":
            self.faults.append(f"no end within {count} tokens, where {expected:.0f} were expected")
        elif repeats(self.utterance.tokens.tolist()):
            self.faults.append("repetition")
        elif count < MISSING * expected:
            self.faults.append(f"{count} tokens, where {expected:.0f} were expected")
        else:
            return False
        return True


def splitting_of(section: Any) -> Splitting:
    """How texts are cut, by the section ``text`` of a configuration."""
    target, longest = section.lengths
    return Splitting(
        target=target,
        longest=longest,
        shortest=min(1.0, target),
        pauses=dict(section.pauses),
        normalize=section.normalize,
    )


def fits(text: str, language: str | None, limit: int) -> bool:
    """Whether a text is estimated to be said within so many speech tokens."""
    return estimate_tokens(text, language) <= FULL * limit


def _whole(blocks: Iterable[Tensor]) -> Tensor:
    """Blocks (n,) fp32 of the host as one, and never twice in memory: what grows is moved by its pages, not copied."""
    whole, count = np.empty(0, np.float32), 0
    for block in blocks:
        whole.resize(count + len(block), refcheck=False)
        whole[count:] = block.numpy()
        count += len(block)
    return torch.from_numpy(whole)


def repeats(tokens: Sequence[int]) -> bool:
    """Whether speech tokens end in one short run of them, again and again."""
    for period in range(1, PERIOD + 1):
        end = tokens[-period * REPEATS :]
        if len(end) == period * REPEATS and list(end) == list(end[:period]) * REPEATS:
            return True
    return False


def _tell(one: _Try) -> None:
    kept = len(one.faults) >= one.attempts
    what = "was kept as it is" if kept else "is right now"
    warnings.warn(
        f"A piece of the text went wrong and {what} ({'; '.join(one.faults)}): {one.piece.text[:60]!r}.",
        RunawayWarning,
        stacklevel=3,
    )


def joined(
    spoken: Iterable[Spoken], rate: int, level: bool = True, heard: list[float] | None = None
) -> Iterator[Tensor]:
    """Samples (n,) of pieces and of the pauses between them, each faded at its ends.

    Args:
        level: bring each to the loudness of those before it, by ``LEVELED`` dB at most.
        heard: dB of pieces before these, which those of these are added to.
    """
    fade = torch.cos(torch.linspace(0, torch.pi / 2, int(FADE * rate))) ** 2
    heard = [] if heard is None else heard
    for one in spoken:
        samples = one.samples.float().cpu().clone()
        count = min(len(fade), len(samples))
        samples[-count:] *= fade[-count:]
        if level:
            own = loudness(samples, rate)
            if own is not None:
                heard.append(own)
                target = sorted(heard)[(len(heard) - 1) // 2]
                gain = 10 ** (max(-LEVELED, min(LEVELED, target - own)) / 20)
                samples *= min(gain, 1.0 / max(1e-9, samples.abs().max().item()))  # without clipping
        yield samples
        if one.piece.pause:
            yield torch.zeros(int(one.piece.pause * rate))


def loudness(samples: Tensor, rate: int) -> float | None:
    """dB of the mean square of what is not a pause, in samples (n,); ``None`` where there is nothing."""
    size = int(BLOCK * rate)
    if len(samples) < size:
        return None
    power = samples[: len(samples) // size * size].view(-1, size).square().mean(dim=1)
    if not power.max() > 0:
        return None
    loud = power[power > power.max() * 10 ** (GATE / 10)]
    return 10 * torch.log10(loud.mean()).item()


def marked(blocks: Iterable[Tensor], watermark: Callable[[Any], Any]) -> Iterator[Tensor]:
    """Blocks (n,) with one watermark over all of them; as many samples as came in."""
    with torch.inference_mode():
        for block in MarkStream(watermark).run(samples.numpy() for samples in blocks):
            yield torch.from_numpy(block.copy())
