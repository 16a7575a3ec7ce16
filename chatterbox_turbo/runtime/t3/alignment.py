"""Where in its text each running utterance is, and when it may or must stop: upstream's analyzer for N requests.

The decisions are those of ``AlignmentStreamAnalyzer`` (upstream ``models/t3/inference/alignment_stream_analyzer.py``),
which keeps the attention of all steps on the host and reads it again at each. Here every request has one row of
static tensors, and no step waits for the device: it can be captured in a CUDA graph. What upstream computes without
ever letting it reach the logits (false starts, durations, the attention of the first step) is left out.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...errors import InvalidRequestError
from .attention_history import AttentionHistory

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
WIDTH = 128  # room for text grows by so many tokens: tensors that move lose their graphs
TAIL_LIMIT = 5.0  # attention of one of the last tokens, summed over steps after the end (0.2 s at full attention)
REPETITION_LIMIT = 5.0  # largest attention to text before the last ``RECENT`` tokens, summed over steps after the end


def describe(flags: int) -> list[str]:
    """Bits of ``AlignmentAnalysis.reasons`` to phrases, one for each reason; none for 0."""
    return [phrase for bit, phrase in PHRASES.items() if flags & bit]


@dataclass
class _State:
    """N rows, the first of which are requests; int64 where nothing else is said. S: text tokens of a request."""

    length: Tensor  # (N,), S
    frame: Tensor  # (N,), steps before the current one
    current: Tensor  # (N,), text token with the most attention in the current step
    position: Tensor  # (N,), the same, without discontinuous moves
    complete: Tensor  # (N,) bool, whether ``position`` has ever been in the ending
    tail: Tensor  # (N, 3) float, attention of the last text tokens, summed over steps after completion
    repeated: Tensor  # (N,) float, largest attention to earlier text tokens, summed likewise
    previous: Tensor  # (N,), the id that the last step began with
    flags: Tensor  # (N,), reasons so far
    text: Tensor  # (N, W), cache positions of the text; padding repeats the last one, so no index lies beyond the maps
    early: Tensor  # (N, W) bool, text tokens before the recent ones
    ending: Tensor  # (N, 3), the last text tokens; of fewer than 3 the first one twice, which leaves a maximum as it is

    @classmethod
    @torch.inference_mode(False)  # ordinary tensors can be written inside and outside of inference mode
    def new(cls, rows: int, width: int, device: torch.device) -> _State:
        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        # double precision loses nothing of float32 values that a limit could notice; MPS has none
        precision = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros((rows, 1 + ENDING), dtype=precision, device=device)
        return cls(
            length=integers(rows),
            frame=integers(rows),
            current=integers(rows),
            position=integers(rows),
            complete=integers(rows).bool(),
            tail=sums[:, 1:],
            repeated=sums[:, 0],
            previous=integers(rows),
            flags=integers(rows),
            text=integers(rows, width),
            early=integers(rows, width).bool(),
            ending=integers(rows, ENDING),
        )

    def enter(self, row: int, start: int, length: int) -> None:
        """A request in its first step. Numbers reach the device without a wait for it."""
        for value in self.values():
            value[row] = 0
        columns = torch.arange(self.text.size(1), device=self.text.device)
        self.length[row] = length
        self.complete[row] = length <= ENDING
        self.text[row] = columns.clamp(max=length - 1) + start
        self.early[row] = columns < length - RECENT
        self.ending[row] = (length - ENDING + torch.arange(ENDING, device=columns.device)).clamp(min=0)

    def take(self, other: _State, rows: int) -> None:
        """The first rows of another one, of the same width or less."""
        for mine, its in zip(self.values(), other.values(), strict=True):
            (mine if mine.dim() == 1 else mine[:, : its.size(1)])[:rows] = its[:rows]
        self.text[:, other.text.size(1) :] = self.text[:, other.text.size(1) - 1, None]

    def first(self, rows: int) -> _State:
        """Views of the first rows."""
        return _State(*(value[:rows] for value in self.values()))

    def values(self) -> list[Tensor]:
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
        self._state = _State.new(1, WIDTH, self._device)
        self._columns = self._count()
        self._rows = 0
        self._history = AttentionHistory(self._device)

    def __len__(self) -> int:
        return len(self._spans)

    def begin(self, requests: int) -> None:
        """Forget everything, and have room for so many requests."""
        self._spans, self._rows = [], 0
        self._history.begin()
        self._make_room(requests, 0)
        self._state.text.zero_()  # rows without meaning are computed too: they read within every map

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
        self._make_room(len(self) + 1, length)
        self._state.enter(len(self), start, length)
        self._spans.append((start, length))
        self._history.admit()
        self._rows = len(self)

    def keep(self, steps: int) -> None:
        """Keep the attention that the request admitted last has over its text, for so many steps; ``kept`` has it."""
        self._history.keep(self._state.text.size(0), steps, self._state.text.size(1))

    def keeping(self) -> Hashable:
        """Where rows of the requests that run are kept, a part of what a graph is captured for; ``None``: nowhere."""
        return self._history.memory()

    def kept(self, number: int, steps: int) -> Tensor:
        """(steps, S) float32, a copy: the attention of request ``number``, as it was observed, before each token.

        Row n is what token n was chosen after. The first row is zeros: that of the prefill is not observed.
        """
        return self._history.rows(number, steps, self._spans[number][1])

    def expect(self, rows: int) -> None:
        """So many rows come from now on; what those behind the requests hold means nothing."""
        self._make_room(rows, 0)
        self._rows = rows

    def tensors(self) -> list[Tensor]:
        """Its state: static tensors, which move only where ``begin``, ``admit`` or ``expect`` need more room."""
        return self._state.values()

    def observe(self, maps: Tensor) -> None:
        """Take in one step of every request.

        Args:
            maps: (N, P) float32, mean attention of the newest position over cache positions; what lies outside
                a request's text is not read.
        """
        reach = max((start + length for start, length in self._spans), default=0)
        if maps.dim() != 2 or maps.size(0) != self._rows or maps.size(1) < reach:
            wanted = f"({self._rows}, {reach} or more)"
            raise InvalidRequestError(f"Attention has the shape {tuple(maps.shape)}, but must be {wanted}.")
        state = self._state.first(self._rows)
        state.frame += 1
        seen = maps.gather(1, state.text)
        if self._history.on:
            self._history.write(state.frame, seen)
        # monotonic mask: token c is visible from step c on
        rows = torch.where(self._columns <= state.frame[:, None], seen, 0.0)
        # the first of equals: padding repeats the last text token, and never wins over it
        current = rows.argmax(dim=1)
        move = current - state.position
        state.current.copy_(current)
        state.position.copy_(torch.where((move > BACKWARD) & (move < FORWARD), current, state.position))
        # before ``complete`` is updated: the completing step itself counts in neither sum
        earlier = torch.where(state.early, rows, 0.0).amax(dim=1)
        state.tail += torch.where(state.complete[:, None], rows.gather(1, state.ending), 0.0)
        state.repeated += torch.where(state.complete, earlier, 0.0)
        state.complete |= state.position >= state.length - ENDING

    def constrain(self, logits: Tensor, previous: Tensor) -> Tensor:
        """Logits in which stop is impossible before the end of the text, and certain after a bad ending.

        Args:
            logits: (N, V), any float dtype, after guidance; not changed.
            previous: (N,) int64, last token of each history, at first the start token.

        Returns:
            (N, V), a new tensor of the same dtype.
        """
        if logits.dim() != 2 or logits.size(0) != self._rows or previous.shape != logits.shape[:1]:
            shapes = f"Logits {tuple(logits.shape)} and previous ids {tuple(previous.shape)}"
            raise InvalidRequestError(f"{shapes} do not fit {self._rows} requests.")
        state = self._state.first(self._rows)
        # both sums are 0 until completion
        long_tail = state.tail.amax(dim=1) >= TAIL_LIMIT
        repetition = state.repeated > REPETITION_LIMIT
        # two equal ids end an utterance, but not the first two
        stuck = (state.frame >= 2) & (previous == state.previous)
        state.previous.copy_(previous)
        state.flags |= LONG_TAIL * long_tail | ALIGNMENT_REPETITION * repetition | TOKEN_REPETITION * stuck

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
        self._history.leave(number)
        last = self._spans.pop()
        if number < len(self):
            self._spans[number] = last
            for value in self._state.values():
                value[number] = value[len(self)]
        self._state.text[len(self)] = 0
        self._rows = len(self)

    def reasons(self) -> Tensor:
        """(N,) int64: bits of all reasons that have forced a stop since admission, for ``describe``."""
        return self._state.flags[: self._rows]

    def positions(self) -> Tensor:
        """(N,) int64: the text token that each utterance has come to."""
        return self._state.position[: self._rows]

    def _make_room(self, rows: int, length: int) -> None:
        state = self._state
        width = max(-(-length // WIDTH) * WIDTH, state.text.size(1))
        if rows > state.text.size(0) or width > state.text.size(1):
            self._state = _State.new(max(rows, state.text.size(0)), width, self._device)
            self._state.take(state, len(self))
            self._columns = self._count()
            self._history.make_room(self._state.text.size(0))

    @torch.inference_mode(False)
    def _count(self) -> Tensor:
        return torch.arange(self._state.text.size(1), device=self._device)[None]
