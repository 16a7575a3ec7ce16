"""Where in its text each running utterance is, and when it may or must stop: upstream's analyzer for N requests.

The decisions are those of ``AlignmentStreamAnalyzer`` (upstream ``models/t3/inference/alignment_stream_analyzer.py``),
which keeps the attention of all steps on the host and reads it again at each. Here every request has one row of
state that grows by nothing, and no step waits for the device. What upstream computes without ever letting it reach
the logits (false starts, durations, the attention of the first step) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...errors import InvalidRequestError

# bits of ``AlignmentAnalysis.reasons``
LONG_TAIL, ALIGNMENT_REPETITION, TOKEN_REPETITION = 1, 2, 4

PHRASES = {
    LONG_TAIL: "the last text tokens were held too long",
    ALIGNMENT_REPETITION: "earlier text was read again after its end",
    TOKEN_REPETITION: "a speech token was repeated",
}

BOUND = 2.0**15  # stands for infinity in logits; float16 holds it
ENDING = 3  # text tokens that count as the end: the stop token draws little attention, punctuation stands before it
RECENT = 5  # text tokens whose attention after the end is no repetition; texts of no more may stop at any time
BACKWARD, FORWARD = -4, 7  # a move of the position strictly between them is continuous
TAIL_LIMIT = 5.0  # attention of one of the last tokens, summed over steps after the end (0.2 s at full attention)
REPETITION_LIMIT = 5.0  # largest attention to text before the last ``RECENT`` tokens, summed over steps after the end


def describe(flags: int) -> list[str]:
    """Bits of ``AlignmentAnalysis.reasons`` to phrases, one for each reason; none for 0."""
    return [phrase for bit, phrase in PHRASES.items() if flags & bit]


@dataclass
class _State:
    """N requests, one row each; int64 where nothing else is said."""

    start: Tensor  # (N,), cache position of the first text token
    length: Tensor  # (N,), text tokens S
    frame: Tensor  # (N,), steps before the current one
    current: Tensor  # (N,), text token with the most attention in the current step
    position: Tensor  # (N,), the same, without discontinuous moves
    complete: Tensor  # (N,) bool, whether ``position`` has ever been in the ending
    tail: Tensor  # (N, 3) float, attention of the last text tokens, summed over steps after completion
    repeated: Tensor  # (N,) float, largest attention to earlier text tokens, summed likewise
    previous: Tensor  # (N,), the id that the last step began with
    flags: Tensor  # (N,), reasons so far

    @classmethod
    def new(cls, rows: int, start: int, length: int, device: torch.device) -> _State:
        """State after the first step, without a wait for the device. Fields may share memory: none is written to."""
        zero = torch.zeros((rows,), dtype=torch.long, device=device)
        # double precision loses nothing of float32 values that a limit could notice; MPS has none
        precision = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros((rows, ENDING), dtype=precision, device=device)
        return cls(
            start=zero + start,
            length=zero + length,
            frame=zero,
            current=zero,
            position=zero,
            complete=zero + length <= ENDING,
            tail=sums,
            repeated=sums[:, 0],
            previous=zero,
            flags=zero,
        )

    def joined(self, other: _State) -> _State:
        return _State(*(torch.cat(pair) for pair in zip(self._values(), other._values(), strict=True)))

    def without(self, number: int) -> _State:
        """All rows but ``number``, whose place the last one takes."""
        last = self.start.size(0) - 1
        if number == last:
            return _State(*(value[:-1] for value in self._values()))
        return _State(*(torch.cat((v[:number], v[last:], v[number + 1 : last])) for v in self._values()))

    def _values(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


class AlignmentAnalysis:
    """Decides for N utterances at once whether the stop token is impossible, certain or left to the model.

    A step of the batch is ``observe`` (requests in progress), ``admit`` (requests that join after their prefill)
    and one ``constrain`` over all of them, in this order; ``leave`` comes between steps. All tensors are on one
    device, and neither ``observe`` nor ``constrain`` waits for it.

    Up to 5 text tokens upstream fails as soon as the utterance reaches the ending (``IndexError``: it takes a
    maximum over no columns; with up to 3 tokens at the first step). Here nothing precedes the ending of such a
    text, so no alignment repetition is found; the other reasons hold, and stop is never suppressed, as upstream.
    Upstream sums in float32, and here in float64: a sum within rounding of a limit may fall on its other side.

    Args:
        stop_token: the id whose logit is changed.
        device: where the state is kept.

    Raises:
        InvalidRequestError: in any method, where a shape does not fit the N requests or a number is out of range.
    """

    def __init__(self, stop_token: int, device: torch.device | str):
        self._stop = stop_token
        self._device = torch.device(device)
        self._spans: list[tuple[int, int]] = []  # (start, S) on the host: widths are known without a sync
        self._state = _State.new(0, 0, 0, self._device)
        self._lay_out()

    def __len__(self) -> int:
        return len(self._spans)

    def admit(self, start: int, length: int) -> None:
        """Append a request in its first step.

        Upstream masks all text tokens but the first in this step, so the position is 0 whatever the attention, and
        sums begin after it: the attention of the prefill is not needed.

        Args:
            start: cache position of the first text token.
            length: S, its text tokens.
        """
        if length < 1 or start < 0:
            raise InvalidRequestError(
                f"The text has {length} tokens and starts at {start}, but must have at least one, and start at 0 or "
                "later."
            )
        self._spans.append((start, length))
        self._state = self._state.joined(_State.new(1, start, length, self._device))
        self._lay_out()

    def observe(self, maps: Tensor) -> None:
        """Take in one step of every request.

        Args:
            maps: (N, P) float32, mean attention of the newest position over cache positions; what lies outside
                a request's text is not read.
        """
        reach = max((start + length for start, length in self._spans), default=0)
        if maps.dim() != 2 or maps.size(0) != len(self) or maps.size(1) < reach:
            wanted = f"({len(self)}, {reach} or more)"
            raise InvalidRequestError(f"Attention has the shape {tuple(maps.shape)}, but must be {wanted}.")
        state = self._state
        state.frame = state.frame + 1
        # monotonic mask: token c is visible from step c on
        rows = torch.where(self._columns <= state.frame[:, None], maps.gather(1, self._text), 0.0)
        # the first of equals: padding repeats the last text token, and never wins over it
        state.current = rows.argmax(dim=1)
        move = state.current - state.position
        state.position = torch.where((move > BACKWARD) & (move < FORWARD), state.current, state.position)
        # before ``complete`` is updated: the completing step itself counts in neither sum
        earlier = torch.where(self._early, rows, 0.0).amax(dim=1)
        state.tail = torch.where(state.complete[:, None], state.tail + rows.gather(1, self._ending), state.tail)
        state.repeated = torch.where(state.complete, state.repeated + earlier, state.repeated)
        state.complete = state.complete | (state.position >= state.length - ENDING)

    def constrain(self, logits: Tensor, previous: Tensor) -> Tensor:
        """Logits in which stop is impossible before the end of the text, and certain after a bad ending.

        Args:
            logits: (N, V), any float dtype, after guidance; not changed.
            previous: (N,) int64, last token of each history, at first the start token.

        Returns:
            (N, V), a new tensor of the same dtype.
        """
        if logits.dim() != 2 or logits.size(0) != len(self) or previous.shape != logits.shape[:1]:
            shapes = f"Logits {tuple(logits.shape)} and previous ids {tuple(previous.shape)}"
            raise InvalidRequestError(f"{shapes} do not fit {len(self)} requests.")
        state = self._state
        # both sums are 0 until completion
        long_tail = state.tail.amax(dim=1) >= TAIL_LIMIT
        repetition = state.repeated > REPETITION_LIMIT
        # two equal ids end an utterance, but not the first two
        stuck = (state.frame >= 2) & (previous == state.previous)
        state.previous = previous.clone()  # the caller may reuse its buffer
        state.flags = state.flags | LONG_TAIL * long_tail | ALIGNMENT_REPETITION * repetition | TOKEN_REPETITION * stuck

        forced = long_tail | repetition | stuck
        early = (state.current < state.length - ENDING) & (state.length > RECENT)
        constrained = torch.where(forced[:, None], -BOUND, logits)
        stop = torch.where(early, -BOUND, logits[:, self._stop])
        constrained[:, self._stop] = torch.where(forced, BOUND, stop)
        return constrained

    def leave(self, number: int) -> None:
        """Drop request ``number``; the last request takes its place."""
        if not 0 <= number < len(self):
            raise InvalidRequestError(f"There is no request {number} among {len(self)}.")
        last = self._spans.pop()
        if number < len(self):
            self._spans[number] = last
        self._state = self._state.without(number)
        self._lay_out()

    def reasons(self) -> Tensor:
        """(N,) int64: bits of all reasons that have forced a stop since admission, for ``describe``."""
        return self._state.flags

    def positions(self) -> Tensor:
        """(N,) int64: the text token that each utterance has come to."""
        return self._state.position

    def _lay_out(self) -> None:
        """Indices and masks of the padded text (N, S_max), which change only when requests come or go."""
        start, length = self._state.start[:, None], self._state.length[:, None]
        width = max((length for _, length in self._spans), default=1)
        self._columns = torch.arange(width, device=self._device)[None]
        self._early = self._columns < length - RECENT
        # padding repeats the last text token, so no index lies beyond the maps
        self._text = start + torch.minimum(self._columns, length - 1)
        # of fewer than 3 tokens the first one is read twice, which leaves the maximum as it is
        self._ending = (length - ENDING + torch.arange(ENDING, device=self._device)).clamp(min=0)
