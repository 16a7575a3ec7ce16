"""The one token loop: a generator over requests. ``generate`` is one request; a batch is several.

How a step is computed is the backbone's business, what the model's family does with logits the procedure's; eager,
compiled and graphed decoding differ only in the backbone handed in. Requests that end leave their place to those
that wait, without stopping the others (continuous batching, Orca 2022).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

from ...errors import DecodingError
from .sampling import EXHAUSTED, IMPOSSIBLE, Knobs, SamplingParameters, filter_guided, filter_unguided, guide, sample


class Backbone(Protocol):
    """Embeddings to logits, with a cache of keys and values that it alone understands."""

    def begin(self, requests: int, rows: int) -> None:
        """Forget everything, and expect at most so many requests at once, each of ``rows`` sequences."""

    def admit(self, embeds: Sequence[Tensor], limits: Sequence[int]) -> Tensor:
        """Requests more, the last: prefixes (rows, P, D) to logits (N * rows, V); so many tokens follow at most."""

    def step(self, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings (N * rows, D) to logits (N * rows, V), and attention (N, C) of the new position over all."""

    def leave(self, number: int) -> None:
        """A request goes; the last one takes its place."""


class Constraint(Protocol):
    """What may change the logits before a token is chosen, by what the attention shows."""

    def admit(self, start: int, length: int) -> None:
        """A request more, the last, whose text takes ``length`` positions of its prefix from ``start`` on."""

    def observe(self, attention: Tensor | None) -> None:
        """Attention (N, C) of the newest position of each request."""

    def constrain(self, logits: Tensor, previous: Tensor) -> Tensor:
        """Logits (N, V), and the ids (N,) before the ones to be chosen, to logits."""

    def reasons(self) -> Tensor:
        """(N,) int64 flags: why it has forced an end, 0 where it has not."""

    def leave(self, number: int) -> None:
        """A request goes; the last one takes its place."""


@dataclass(frozen=True)
class Procedure:
    """What a family does between logits and token.

    Attributes:
        filter: logits (N, V), seen ids (N, V), knobs → logits to draw from.
        history_keeps_start: the start token stays in the history once there are tokens (Llama), or only stands in
            while there are none (GPT-2).
        stops_at_first: a stop token at index 0 ends the utterance (GPT-2 goes on, as upstream does).
        ends_exhausted: the utterance ends where every id is excluded (GPT-2); otherwise that is an error.
    """

    filter: Callable[[Tensor, Tensor, Knobs], Tensor]
    history_keeps_start: bool
    stops_at_first: bool
    ends_exhausted: bool


GUIDED = Procedure(filter_guided, history_keeps_start=True, stops_at_first=True, ends_exhausted=False)
UNGUIDED = Procedure(filter_unguided, history_keeps_start=False, stops_at_first=False, ends_exhausted=True)


@dataclass
class Request:
    """One utterance to decode.

    Attributes:
        embeds: (rows, P, D), the prefix; rows = 2 with guidance, else 1.
        knobs: the sampling parameters.
        limit: tokens at most, the stop token included; at least 1.
        text: first position of the text in the prefix, and its length; for the constraint.
        generator: where its random numbers come from; ``None`` for the global generator.
    """

    embeds: Tensor
    knobs: SamplingParameters
    limit: int
    text: tuple[int, int] | None = None
    generator: Generator | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Ids that begin and end speech, and ``embed``: tokens (N, 1), their indexes (N,) int64 → embeddings (N, D)."""

    start: int
    stop: int
    embed: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Token:
    """One step of one request.

    ``end`` is set on the last one; an ``exhausted`` end carries no token. ``reasons``: the constraint's flags.
    """

    request: int
    index: int
    id: int | None
    end: Literal["stop", "limit", "exhausted"] | None = None
    reasons: int = 0


@dataclass
class _Running:
    """A request in progress. ``count``: tokens chosen so far, of which the host may not have seen the last ones."""

    number: int
    request: Request
    count: int = 0
    ended: bool = False


@dataclass
class _Chosen:
    """A step whose tokens are on their way to the host."""

    running: list[_Running]
    indexes: list[int]
    results: Tensor  # (N, 3) on the host: token, status, reasons
    arrived: Any  # a CUDA event, or None where the copy is not asynchronous
    generators: list[Tensor | None] = field(default_factory=list)  # their states after this step


@dataclass
class Loop:
    """What the requests of one model have in common.

    Attributes:
        backbone, procedure, vocabulary: see there.
        constraint: for models whose attention decides where speech may end; or ``None``.
        lag: steps that the device may run ahead of the host. Reading a token at once costs a device sync a step;
            tokens past a stop are dropped, and the random numbers that they took are put back.
    """

    backbone: Backbone
    procedure: Procedure
    vocabulary: Vocabulary
    constraint: Constraint | None = None
    lag: int = 0

    def generate(self, requests: Sequence[Request], slots: int | None = None) -> Iterator[Token]:
        """Tokens of all requests, step by step, until each has ended.

        At most ``slots`` requests run at once (all, where it is ``None``); the others wait, and enter in order.
        A request without a generator of its own draws from the global one, in the order of the running requests.

        Raises:
            DecodingError: a token cannot be drawn; the message names the step.
        """
        return _run(self, list(requests), slots)


@torch.inference_mode()
def _run(loop: Loop, requests: list[Request], slots: int | None) -> Iterator[Token]:
    if not requests:
        return
    batch = _Batch(loop, min(slots or len(requests), len(requests)), requests)
    waiting = deque(_Running(number, request) for number, request in enumerate(requests))
    pending: deque[_Chosen] = deque()
    while waiting or batch.running or pending:
        if waiting and len(batch.running) < batch.slots:
            batch.admit([waiting.popleft() for _ in range(min(len(waiting), batch.slots - len(batch.running)))])
        if batch.running:
            pending.append(batch.choose())
        while pending and (len(pending) > loop.lag or not batch.running):
            yield from batch.read(pending.popleft())
        batch.step()


class _Batch:
    """The requests that run, in the order of their places; each ``leave`` moves the last one into the gap."""

    def __init__(self, loop: Loop, slots: int, requests: Sequence[Request]):
        self.loop, self.slots = loop, slots
        self.rows = max(request.embeds.size(0) for request in requests)
        self.running: list[_Running] = []
        self.logits: Tensor | None = None  # (N, rows, V) of the tokens to choose next
        self.seen: Tensor | None = None  # (N, V) bool, the ids of each history
        self.previous: Tensor | None = None  # (N, 1) int64, the newest ids
        self.counts: Tensor | None = None  # (N,) int64, tokens chosen so far
        self.knobs: Knobs | None = None
        self.device = requests[0].embeds.device
        # the states that the stop puts back are worth keeping only where the device runs ahead
        self.keep_states = loop.lag > 0
        self.alone = len(requests) == 1
        loop.backbone.begin(slots, self.rows)

    def admit(self, some: list[_Running]) -> None:
        loop, requests = self.loop, [one.request for one in some]
        # one row beside guided requests: both rows are the same
        embeds = [request.embeds.expand(self.rows, -1, -1) for request in requests]
        logits = loop.backbone.admit(embeds, [request.limit for request in requests])
        if loop.constraint is not None:
            for request in requests:
                loop.constraint.admit(*request.text)
        start = torch.full((len(some), 1), loop.vocabulary.start, dtype=torch.long, device=self.device)
        seen = torch.zeros((len(some), logits.size(-1)), dtype=torch.bool, device=self.device).scatter_(1, start, True)
        self.logits = _append(self.logits, logits.unflatten(0, (-1, self.rows)))
        self.seen = _append(self.seen, seen)
        self.previous = _append(self.previous, start)
        self.counts = _append(self.counts, torch.zeros_like(start[:, 0]))
        self.running += some
        self.knobs = None

    def choose(self) -> _Chosen:
        """One token for each; nothing here waits for the device."""
        loop, procedure = self.loop, self.loop.procedure
        if self.knobs is None:
            self.knobs = Knobs([one.request.knobs for one in self.running], self.logits.dtype, self.device)
        generators = [one.request.generator for one in self.running]
        logits = guide(self.logits, self.knobs.guidance)
        if loop.constraint is not None:
            logits = loop.constraint.constrain(logits, self.previous[:, 0])
        tokens, status = sample(procedure.filter(logits, self.seen, self.knobs), self.knobs, generators)
        if not procedure.history_keeps_start:
            for place, one in enumerate(self.running):
                if one.count == 0:
                    self.seen[place] = False
        self.seen.scatter_(1, tokens, True)
        self.previous = tokens
        self.counts += 1
        chosen = self._send(tokens, status)
        for one in self.running:
            one.count += 1
        return chosen

    def _send(self, tokens: Tensor, status: Tensor) -> _Chosen:
        constraint = self.loop.constraint
        reasons = torch.zeros_like(status) if constraint is None else constraint.reasons()[:, None]
        results, arrived = torch.cat([tokens, status, reasons], dim=1), None
        if self.device.type == "cuda":
            results = torch.empty_like(results, device="cpu", pin_memory=True).copy_(results, non_blocking=True)
            # the current stream of the model's device, which need not be the current device
            arrived = torch.cuda.current_stream(self.device).record_event()
        states = [self._state(one.request.generator) for one in self.running] if self.keep_states else []
        return _Chosen(list(self.running), [one.count for one in self.running], results, arrived, states)

    def read(self, chosen: _Chosen) -> Iterator[Token]:
        """Tokens of a step that has reached the host; requests that end with it leave."""
        if chosen.arrived is not None:
            chosen.arrived.synchronize()
        for place, (one, index) in enumerate(zip(chosen.running, chosen.indexes, strict=True)):
            if one.ended:
                continue  # past its end, chosen before the host knew
            token = self._token(one, index, *chosen.results[place].tolist())
            if token.end is not None:
                self._end(one, chosen.generators[place] if chosen.generators else None)
            yield token

    def _token(self, one: _Running, index: int, value: int, status: int, reasons: int) -> Token:
        procedure = self.loop.procedure
        if status == EXHAUSTED and procedure.ends_exhausted:
            return Token(one.number, index, None, "exhausted", reasons)
        if status in (IMPOSSIBLE, EXHAUSTED):
            raise DecodingError(
                f"No token can be drawn at step {index} of request {one.number}.",
                "The logits hold NaN or infinity." if status == IMPOSSIBLE else "Every id is excluded.",
                "Check the model's weights and number format, and the sampling parameters.",
            )
        if value == self.loop.vocabulary.stop and (index > 0 or procedure.stops_at_first):
            return Token(one.number, index, value, "stop", reasons)
        return Token(one.number, index, value, "limit" if index + 1 == one.request.limit else None, reasons)

    def _end(self, one: _Running, state: Tensor | None) -> None:
        one.ended = True
        if state is not None and (one.request.generator is not None or self.alone):
            self._restore(one.request.generator, state)
        if one in self.running:
            self._leave(self.running.index(one))

    def _leave(self, place: int) -> None:
        last = len(self.running) - 1
        for tensor in (self.logits, self.seen, self.previous, self.counts):
            if place != last:
                tensor[place] = tensor[last]
        self.logits, self.seen, self.previous = self.logits[:last], self.seen[:last], self.previous[:last]
        self.counts = self.counts[:last]
        self.running[place] = self.running[last]
        self.running.pop()
        self.loop.backbone.leave(place)
        if self.loop.constraint is not None:
            self.loop.constraint.leave(place)
        self.knobs = None

    def step(self) -> None:
        """The next logits of every running request; those at their limit leave first, read or not."""
        for one in [one for one in self.running if one.count == one.request.limit]:
            self._leave(self.running.index(one))
        if not self.running:
            return
        embeds = self.loop.vocabulary.embed(self.previous, self.counts)
        logits, attention = self.loop.backbone.step(embeds.repeat_interleave(self.rows, dim=0))
        self.logits = logits.unflatten(0, (-1, self.rows))
        if self.loop.constraint is not None:
            self.loop.constraint.observe(attention)

    def _state(self, generator: Generator | None) -> Tensor:
        if generator is not None:
            return generator.get_state()
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _restore(self, generator: Generator | None, state: Tensor) -> None:
        if generator is not None:
            generator.set_state(state)
        elif self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)


def _append(rows: Tensor | None, more: Tensor) -> Tensor:
    return more if rows is None else torch.cat([rows, more])
