"""Speech tokens that arrive piece by piece to samples that leave piece by piece, as one utterance without seams.

Flow matching sees everything at once, so it runs over windows: new tokens, tokens before them as context, a few behind
them as look-ahead, whose frames are given up and solved again in the next window. Every frame that is kept goes into
one sequence of mel frames, with one noise for all windows. The vocoder runs over windows of that sequence that overlap
by what its convolutions reach, with one source of harmonics, so that its samples are those of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InvalidRequestError, brief
from ..arguments import whole
from .drawn import Drawn
from .streamed_vocoder import PITCH_REACH, SAMPLE_REACH

FRAMES_PER_TOKEN, SAMPLES_PER_FRAME = 2, 480


@dataclass(frozen=True)
class Windows:
    """How an utterance is cut. The figures behind the defaults are in ``docs/streaming.md``.

    Attributes:
        first_chunk, chunk: new tokens of the first window, and of the next ``even`` ones.
        growth: how many times as many new tokens each later window has, at least 1.
        longest_chunk: where that ends.
        even: a window that is longer than the one before it is not there yet when that one has been heard; so many of
            one length gain the time for it.
        context: tokens before the new ones that a window has; ``None`` for all of them.
        look_ahead: tokens behind them, which must have come; 3 is what the encoder's convolution sees.
        seen: tokens behind them that a window has if they have come by then, where that is more.
        held: mel frames that are rendered and held back, because what comes behind them is missing; a vocoder window
            begins that much further back too, or by what the vocoder reaches.
        faded: how many of them are cross-faded with those of the next window.

    Raises:
        InvalidRequestError: a number that is none, or too small.
    """

    first_chunk: int = 24
    chunk: int = 40
    growth: float = 1.25
    longest_chunk: int = 100
    even: int = 3
    context: int | None = 50
    look_ahead: int = 3
    seen: int = 25
    held: int = 12
    faded: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 1 if name.endswith("chunk") or name == "even" else 0
            if name == "growth" or (name == "context" and value is None):
                continue
            if isinstance(value, bool) or whole(name, value) < low:
                raise InvalidRequestError(f"{name} is {brief(value)}, but must be {low} or more.")
        if not isinstance(self.growth, int | float) or not 1 <= self.growth < float("inf"):
            raise InvalidRequestError(f"growth is {brief(self.growth)}, but must be a number, 1 or more.")
        if self.faded > self.held:
            raise InvalidRequestError(
                f"{self.faded} frames are to be cross-faded, but only {self.held} are held back.",
                "What has been given away cannot be faded any more.",
                "Choose faded no larger than held.",
            )

    def size(self, number: int) -> int:
        """New tokens of a window, the first one's number being 0."""
        if number == 0:
            return self.first_chunk
        grown = self.chunk
        for _ in range(number - self.even):
            if grown >= self.longest_chunk:
                break
            grown = int(grown * self.growth)
        return max(self.chunk, min(grown, self.longest_chunk))


class AcousticStream:
    """The acoustic half of one utterance, window by window.

    All samples together are as many as one call for all tokens gives: 960 a token, less those of ``skipped`` and
    ``crop``. Where a consumer stops does not matter: nothing is held but tensors of this object.

    Args:
        mels: ``mels(tokens (n,) int64, first, noise (1, 80, 2 n) fp32)`` gives mel frames (1, 80, 2 n) of tokens from
            number ``first`` of the utterance on.
        vocode: ``vocode(mel (1, 80, T), first, known)`` gives samples (480 T,) of frames from number ``first`` on; the
            source of the first ``known`` ones is that of the calls before (``StreamedVocoder``).
        noise: normal numbers (1, 80, 2 n) of the utterance.
        windows: how it is cut.
        fade: (m,) factors of the first samples (upstream's ``trim_fade``).
        tail: (k,) int64 tokens that follow the last one (Turbo's silence).
        skipped: mel frames at the beginning that one call gives up (``FlowWindows.skipped``).
        crop: samples that are cut off at the end.
        reach: mel frames on either side that a sample of ``vocode`` depends on.
    """

    def __init__(
        self,
        mels: Callable[[Tensor, int, Tensor], Tensor],
        vocode: Callable[[Tensor, int, int], Tensor],
        noise: Drawn,
        windows: Windows | None = None,
        fade: Tensor | None = None,
        tail: Tensor | None = None,
        skipped: int = 0,
        crop: int = 0,
        reach: int = SAMPLE_REACH,
    ):
        self.windows = windows or Windows()
        if crop > self.windows.held * SAMPLES_PER_FRAME:
            raise InvalidRequestError(
                f"{crop} samples are to be cut off at the end, but only {self.windows.held} frames are held back.",
                "What has been given away cannot be cut off any more.",
                f"Choose held of {-(-crop // SAMPLES_PER_FRAME)} or more.",
            )
        self._mels, self._vocode, self._noise = mels, vocode, noise
        self._fade, self._tail, self._crop, self._reach = fade, tail, crop, reach
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._first_token = 0  # number of the first one that is kept
        self._solved = 0  # tokens whose frames are in the sequence
        self._frames: Tensor | None = None  # (1, 80, n) of the sequence, from number _first_frame on
        self._first_frame = self._given = skipped  # and the frames whose samples have been given away
        self._known = skipped  # frames whose source is final
        self._rest: Tensor | None = None  # samples held back, from frame _given on
        self._sent = self._number = 0
        self._finished = self._closed = False

    def push(self, tokens: Tensor) -> Iterator[Tensor]:
        """Take speech tokens (n,) int64; blocks of samples (m,) fp32 that are complete by now.

        What is not asked for comes with the next call.

        Raises:
            InvalidRequestError: the utterance has ended.
        """
        self._refuse_if_over()
        self._take(tokens)
        return self._blocks()

    def wanted(self) -> int:
        """Tokens of the utterance that the next window is to be solved with, so that others do not change its sound.

        Look-ahead is short for the first window, which is waited for, and doubles up to ``seen``.
        """
        windows = self.windows
        ahead = min(windows.seen, windows.look_ahead << min(self._number, 16))
        return self._solved + windows.size(self._number) + max(ahead, windows.look_ahead)

    def finish(self) -> Iterator[Tensor]:
        """No more tokens come; the blocks that are left, to the last sample.

        Raises:
            InvalidRequestError: there were no tokens, or the utterance has ended before.
        """
        self._refuse_if_over()
        if self._tail is not None:
            self._take(self._tail)
        if not self._first_token + len(self._tokens):
            raise InvalidRequestError(
                "There are no speech tokens.",
                "Speech ended before its first token.",
                "Change the text, the seed or the voice.",
            )
        self._finished = True
        return self._blocks()

    def run(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """All blocks of tokens that come in chunks (n,); closed at the end, or where the consumer stops."""
        try:
            for tokens in chunks:
                yield from self.push(tokens)
            yield from self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of everything; nothing more comes."""
        self._closed = True
        self._tokens, self._frames, self._rest = self._tokens[:0], None, None

    def _refuse_if_over(self) -> None:
        if self._finished or self._closed:
            raise InvalidRequestError(
                "This stream has ended.", "It is for one utterance.", "Make another one for the next."
            )

    def _take(self, tokens: Tensor) -> None:
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise InvalidRequestError(f"Speech tokens must be whole numbers (n,), but are {brief(tokens)}.")
        before = [self._tokens.to(tokens.device)] if len(self._tokens) else []  # a copy of nothing would be waited for
        self._tokens = torch.cat([*before, tokens.long()])

    def _blocks(self) -> Iterator[Tensor]:
        while not self._closed:
            count = self._first_token + len(self._tokens)
            new = min(self.windows.size(self._number), count - self._solved)
            if not self._finished and count - self._solved < self.windows.size(self._number) + self.windows.look_ahead:
                return
            if new < count - self._solved <= new + self.windows.look_ahead and self._finished:
                new = count - self._solved  # no window for what the look-ahead shows anyway
            if new == 0 and (self._frames is None or self._rest is None):
                return
            block = self._advance(new, count)
            if len(block):
                yield block

    def _advance(self, new: int, count: int) -> Tensor:
        """Samples that one window with ``new`` tokens makes complete, of ``count`` that have come."""
        ahead = min(max(self.windows.look_ahead, self.windows.seen), count - self._solved - new)
        mel = self._solve(new, ahead) if new else self._frames[..., :0]
        solved, last = self._solved + new, self._finished and self._solved + new == count
        end = FRAMES_PER_TOKEN * solved
        shown = min(end + self.windows.held, FRAMES_PER_TOKEN * (solved + ahead))
        kept = mel if self._frames is None else torch.cat([self._frames, mel], dim=2)
        kept = kept[..., : shown - self._first_frame]
        begin = max(self._first_frame, self._given - max(self.windows.held, self._reach))
        known = min(self._known, self._first_frame + kept.size(2)) - begin
        samples = self._vocode(kept[..., begin - self._first_frame :], begin, known)
        samples = self._join(samples[(self._given - begin) * SAMPLES_PER_FRAME :])
        given = end if last else max(self._given, min(end, shown - self.windows.held))
        cut = (given - self._given) * SAMPLES_PER_FRAME
        block = samples[: max(0, len(samples) - self._crop) if last else cut]
        # nothing has changed so far, so that whoever catches an error may go on
        self._rest = None if last else samples[cut : cut + self.windows.faded * SAMPLES_PER_FRAME]
        self._given, self._known = given, max(given, end - PITCH_REACH)
        self._solved, self._number = solved, self._number + 1
        keep_from = max(self._first_frame, given - max(self.windows.held, self._reach))
        self._frames = kept[..., keep_from - self._first_frame : end - self._first_frame].clone()
        self._first_frame = keep_from
        self._forget_tokens()
        return self._faded_in(block)

    def _solve(self, new: int, ahead: int) -> Tensor:
        """Mel frames (1, 80, 2 (new + ahead)) of the next tokens."""
        context = self.windows.context
        begin = 0 if context is None else max(0, self._solved - context)
        end = self._solved + new + ahead
        tokens = self._tokens[begin - self._first_token : end - self._first_token]
        mel = self._mels(tokens, begin, self._noise.between(FRAMES_PER_TOKEN * begin, FRAMES_PER_TOKEN * end))
        mel = mel[..., FRAMES_PER_TOKEN * (self._solved - begin) :]
        return mel[..., self._given :] if self._frames is None else mel

    def _join(self, samples: Tensor) -> Tensor:
        """Samples from frame ``_given`` on, the first of them cross-faded from those that were held back."""
        if self._rest is None or not len(self._rest):
            return samples
        count = min(len(self._rest), len(samples))
        ramp = (1 - torch.cos(torch.linspace(0, torch.pi, count + 2, device=samples.device)[1:-1])) / 2
        joined = torch.lerp(self._rest[:count], samples[:count], ramp)
        return torch.cat([joined, samples[count:]])

    def _forget_tokens(self) -> None:
        if self.windows.context is None:
            return
        before = max(self._first_token, self._solved - self.windows.context)
        self._tokens = self._tokens[before - self._first_token :].clone()
        self._first_token = before
        self._noise.forget(FRAMES_PER_TOKEN * before)

    def _faded_in(self, block: Tensor) -> Tensor:
        at, self._sent = self._sent, self._sent + len(block)
        factors = None if self._fade is None else self._fade[at : at + len(block)].to(block)
        if factors is None or not len(factors):
            return block.clone()
        return torch.cat([block[: len(factors)] * factors, block[len(factors) :]])
