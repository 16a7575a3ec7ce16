"""The requests that run: they enter, get one token after the other, and leave their place to those that wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from ...errors import DecodingError
from ..device import random_state
from .requests import Request, Token
from .sampling import EXHAUSTED, IMPOSSIBLE
from .token_step import TokenStep


@dataclass
class Running:
    """A request in progress.

    ``count``: tokens chosen so far, of which the host may not have seen the last ones. ``attention``: what ``Token`` is
    to have of it, once it has left.
    """

    number: int
    request: Request
    count: int = 0
    ended: bool = False
    attention: Tensor | None = None


@dataclass
class Chosen:
    """A step whose tokens are on their way to the host."""

    running: list[Running]
    indexes: list[int]
    results: Tensor  # (N or more, 3) on the host: token, status, reasons
    arrived: torch.cuda.Event | None  # or None where the copy is not asynchronous
    generators: list[Tensor] = field(default_factory=list)  # their states after this step


class Batch:
    """The requests that run, in the order of their places; each ``leave`` moves the last one into the gap.

    Args:
        step: what computes their tokens.
        lag: steps that the device may run ahead of the host.
        slots: requests at once.
        rows: of the widest request.
        alone: there is one request, which may draw from the global generator.
    """

    def __init__(self, step: TokenStep, lag: int, slots: int, rows: int, alone: bool):
        self._step, self._lag, self.slots = step, lag, slots
        self._rows, self._alone = rows, alone
        self.running: list[Running] = []
        self._sent = 0
        self._changed = False  # who runs, since the last token
        # the states that the stop puts back are worth keeping only where the device runs ahead
        self._keep_states = lag > 0

    def begin(self) -> None:
        """Forget whoever ran before."""
        self._step.begin(self.slots, self._rows)

    def admit(self, some: list[Running]) -> None:
        """Requests more: their prefixes are computed."""
        step, requests = self._step, [one.request for one in some]
        self._device = requests[0].embeds.device
        # one row beside guided requests: both rows are the same
        embeds = [request.embeds.expand(self._rows, -1, -1) for request in requests]
        limits, voices = zip(*((request.limit, request.voice) for request in requests), strict=True)
        logits = step.backbone.admit(embeds, limits, voices)
        if step.constraint is not None:
            for request in requests:
                step.constraint.admit(*request.text)
                if request.aligned:
                    step.constraint.keep(request.limit)
        step.admit(logits, len(self.running))
        self.running += some
        self._changed = True

    def choose(self) -> Chosen:
        """One token for each; nothing here waits for the device."""
        if self._changed:
            self._step.set_knobs([one.request.knobs for one in self.running])
            self._changed = False
        self._step.draw([one.request.generator for one in self.running])
        self._step(len(self.running))
        chosen = self._send()
        for one in self.running:
            one.count += 1
        return chosen

    def _send(self) -> Chosen:
        results, arrived = self._step.places.results, None
        if self._device.type == "cuda":
            landing, arrived = self._step.places.landing(self._sent % (self._lag + 1))
            results = landing.copy_(results, non_blocking=True)
            # the current stream of the model's device, which need not be the current device
            arrived.record(torch.cuda.current_stream(self._device))
            self._sent += 1
        elif self._lag:
            results = results.clone()
        states = [self._state(one.request.generator) for one in self.running] if self._keep_states else []
        return Chosen(list(self.running), [one.count for one in self.running], results, arrived, states)

    def read(self, chosen: Chosen) -> Iterator[Token]:
        """Tokens of a step that has reached the host; requests that end with it leave."""
        if chosen.arrived is not None:
            chosen.arrived.synchronize()
        values = chosen.results.tolist()  # at once: the memory is written again
        for place, (one, index) in enumerate(zip(chosen.running, chosen.indexes, strict=True)):
            if one.ended or one.request.abandoned:
                continue  # past its end, chosen before the host knew
            token = self._token(one, index, *values[place])
            if token.end is not None:
                self._end(one, chosen.generators[place] if chosen.generators else None)
                if one.attention is not None:
                    token = replace(token, attention=one.attention[: index + 1])
            yield token

    def _token(self, one: Running, index: int, value: int, status: int, reasons: int) -> Token:
        procedure = self._step.procedure
        if status == EXHAUSTED and procedure.ends_exhausted:
            return Token(one.number, index, None, "exhausted", reasons)
        if status in (IMPOSSIBLE, EXHAUSTED):
            raise DecodingError(
                f"No token can be drawn at step {index} of request {one.number}.",
                "The logits hold NaN or infinity." if status == IMPOSSIBLE else "Every id is excluded.",
                "Check the model's weights and number format, and the sampling parameters.",
            )
        if value == self._step.vocabulary.stop and (index > 0 or procedure.stops_at_first):
            return Token(one.number, index, value, "stop", reasons)
        return Token(one.number, index, value, "limit" if index + 1 == one.request.limit else None, reasons)

    def _end(self, one: Running, state: Tensor | None) -> None:
        one.ended = True
        if state is not None and (one.request.generator is not None or self._alone):
            self._restore(one.request.generator, state)
        if one in self.running:
            self._leave(self.running.index(one))

    def _leave(self, place: int) -> None:
        last, one = len(self.running) - 1, self.running[place]
        if one.request.aligned:
            one.attention = self._step.constraint.kept(place, one.count)
        self._step.leave(place, last)
        self.running[place] = self.running[last]
        self.running.pop()
        self._changed = True

    def step(self) -> None:
        """The next logits of every running request; those at their limit, or that nobody wants, leave first."""
        for one in [one for one in self.running if one.count == one.request.limit or one.request.abandoned]:
            self._leave(self.running.index(one))
        if self.running:
            self._step.advance(len(self.running))

    def _state(self, generator: Generator | None) -> Tensor:
        if generator is not None:
            return generator.get_state()
        return random_state.state(self._device)

    def _restore(self, generator: Generator | None, state: Tensor) -> None:
        if generator is not None:
            generator.set_state(state)
        else:
            random_state.restore(self._device, state)
