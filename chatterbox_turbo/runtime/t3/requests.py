"""What the token loop is given and what it gives: requests, tokens, and the parts that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Generator, Tensor

from .sampling import Knobs, SamplingParameters, filter_guided, filter_unguided


class Backbone(Protocol):
    """Embeddings to logits, with a cache of keys and values that it alone understands.

    ``captured``: ``compute`` and what surrounds it run as one CUDA graph a token. Only such a backbone has the methods
    from ``compute`` on.
    """

    captured: bool

    def begin(self, requests: int, rows: int) -> None:
        """Forget everything, and expect at most so many requests at once, each of ``rows`` sequences."""

    def admit(self, embeds: Sequence[Tensor], limits: Sequence[int], voices: Sequence[int] = ()) -> Tensor:
        """Requests more, the last: prefixes (rows, P, D) to logits (N * rows, V); so many tokens follow at most.

        ``voices``: how many of the first positions of each say the voice, and nothing of the text.
        """

    def step(self, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings (N * rows, D) to logits (N * rows, V), and attention (N, C) of the new position over all."""

    def leave(self, number: int) -> None:
        """A request goes; the last one takes its place."""

    def compute(self, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a step does on the device; there may be more requests than have been admitted."""

    def advance(self) -> None:
        """What a step does on the host."""

    def shape(self) -> Hashable:
        """What the shapes of the next ``compute`` depend on."""

    def addresses(self) -> Hashable:
        """Fingerprint of the memory that ``compute`` reads and writes."""

    def changed(self) -> Sequence[Tensor]:
        """What ``compute`` changes in a way that repeating it would not repeat."""


class Constraint(Protocol):
    """What may change the logits before a token is chosen, by what the attention shows.

    The methods from ``expect`` on are those that a captured backbone needs.
    """

    def begin(self, requests: int) -> None:
        """Forget everything, and expect at most so many requests at once."""

    def admit(self, start: int, length: int) -> None:
        """A request more, the last, whose text takes ``length`` positions of its prefix from ``start`` on."""

    def keep(self, steps: int) -> None:
        """Keep the attention that the request admitted last has over its text, for so many steps at most."""

    def kept(self, number: int, steps: int) -> Tensor:
        """That of a request (steps, S) float32: row n is what its token n was chosen after. The first means nothing."""

    def observe(self, attention: Tensor | None) -> None:
        """Attention (N, C) of the newest position of each request."""

    def constrain(self, logits: Tensor, previous: Tensor) -> Tensor:
        """Logits (N, V), and the ids (N,) before the ones to be chosen, to logits."""

    def reasons(self) -> Tensor | None:
        """(N,) int64 flags: why it has forced an end, 0 where it has not; ``None`` where it does not tell."""

    def leave(self, number: int) -> None:
        """A request goes; the last one takes its place."""

    def expect(self, rows: int) -> None:
        """So many rows come from now on, those behind the requests without meaning."""

    def keeping(self) -> Hashable:
        """Where attention of the requests that run is kept; ``None``: nowhere."""

    def tensors(self) -> Sequence[Tensor]:
        """Its state: static tensors."""


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
        aligned: its last token is to have the attention over the text; there must be a constraint then.
        abandoned: nobody wants its tokens any more: it leaves at the next step, without an end.
        voice: how many of the first positions of the prefix say the voice, and nothing of the text.
    """

    embeds: Tensor
    knobs: SamplingParameters
    limit: int
    text: tuple[int, int] | None = None
    generator: Generator | None = None
    aligned: bool = False
    abandoned: bool = False
    voice: int = 0


@dataclass(frozen=True)
class Vocabulary:
    """The ids that begin and end speech, and how an id becomes an embedding.

    Attributes:
        embed: tokens (N, 1), their indexes (N,) int64 → embeddings (N, D), without a wait for the device.
        addresses: fingerprint of the memory that ``embed`` reads.
    """

    start: int
    stop: int
    embed: Callable[[Tensor, Tensor], Tensor]
    addresses: Callable[[], Hashable] = tuple


@dataclass(frozen=True)
class Token:
    """One step of one request.

    ``end`` is set on the last one; an ``exhausted`` end carries no token. ``reasons``: the constraint's flags.
    ``attention``: on the last one of an ``aligned`` request, (tokens, S) float32 on the device (``Constraint.kept``).
    """

    request: int
    index: int
    id: int | None
    end: Literal["stop", "limit", "exhausted"] | None = None
    reasons: int = 0
    attention: Tensor | None = field(default=None, compare=False)
