"""The one token loop: a generator over requests. ``generate`` is one request; a batch is several.

How a step is computed is the backbone's business (``prefill`` and ``step``), how a token is chosen and
embedded the request's; eager, compiled and graphed decoding differ only in the backbone handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import DecodingError


class Backbone(Protocol):
    """Embeddings to logits, with a cache of keys and values that it alone understands."""

    def prefill(self, embeds: Tensor) -> tuple[Tensor, Any]:
        """Embeddings (R, P, D) to logits (R, V) of the last position, and the cache of all P positions."""

    def step(self, embeds: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Embeddings (R, 1, D) to logits (R, V), and the cache grown by one position."""


@dataclass
class Request:
    """One utterance to decode.

    Attributes:
        embeds: (R, P, D), the prefix; R = 2 with guidance, else 1.
        choose: logits (R, V), history (1, n) int64 → token (1, 1) int64, or ``None`` if none is possible.
        embed: token (1, 1), its index → embedding (R, 1, D).
        start_token: the id that the history begins with.
        stop_token: the id that ends the utterance.
        limit: tokens at most, the stop token included; at least 1.
        history_keeps_start: whether the start token stays in the history once there are tokens (Llama), or
            only stands in while there are none (GPT-2).
        stops_at_first: whether a stop token at index 0 ends the utterance (GPT-2 goes on, as upstream does).
    """

    embeds: Tensor
    choose: Callable[[Tensor, Tensor], Tensor | None]
    embed: Callable[[Tensor, int], Tensor]
    start_token: int
    stop_token: int
    limit: int
    history_keeps_start: bool = True
    stops_at_first: bool = True


@dataclass(frozen=True)
class Token:
    """One step of one request. ``end`` is set on the last one; an ``exhausted`` end carries no token."""

    request: int
    index: int
    id: Tensor | None  # (1, 1) int64
    end: Literal["stop", "limit", "exhausted"] | None = None


class _Running:
    """A request in progress: its cache, the logits of its next token, its ids in one preallocated row."""

    def __init__(self, number: int, request: Request, backbone: Backbone):
        self.number, self.request = number, request
        self.ids = torch.empty((1, request.limit + 1), dtype=torch.long, device=request.embeds.device)
        self.ids[0, 0] = request.start_token
        self.count = 0
        self.logits, self.cache = backbone.prefill(request.embeds)

    def history(self) -> Tensor:
        first = 0 if self.request.history_keeps_start or self.count == 0 else 1
        return self.ids[:, first : self.count + 1]

    def choose(self) -> Token:
        index = self.count
        try:
            token = self.request.choose(self.logits, self.history())
        except torch.OutOfMemoryError:
            raise  # a RuntimeError too, and not about logits
        except RuntimeError as error:
            raise DecodingError(
                f"No token can be drawn at step {index}: {error}.",
                "The logits hold NaN or leave no id possible.",
                "Check the model's weights and number format, and the sampling parameters.",
            ) from error
        if token is None:
            return Token(self.number, index, None, "exhausted")
        self.ids[:, index + 1 : index + 2] = token
        self.count += 1
        # one device sync a token, as upstream
        if int(token) == self.request.stop_token and (index > 0 or self.request.stops_at_first):
            return Token(self.number, index, token, "stop")
        return Token(self.number, index, token, "limit" if self.count == self.request.limit else None)


@torch.inference_mode()
def generate_tokens(requests: Sequence[Request], backbone: Backbone) -> Iterator[Token]:
    """Tokens of all requests, step by step, until each has ended; a request that ends leaves the others running.

    Random numbers are drawn from the global generator, one draw a request and step, in the order of requests.

    Raises:
        DecodingError: a token cannot be drawn; the message names the step.
    """
    running = [_Running(number, request, backbone) for number, request in enumerate(requests)]
    while running:
        for one in list(running):
            token = one.choose()
            yield token
            if token.end is not None:
                running.remove(one)
                continue
            embeds = one.request.embed(token.id, token.index + 1)
            one.logits, one.cache = backbone.step(embeds, one.cache)
