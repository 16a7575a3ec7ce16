"""From logits to tokens: pure functions, each equal to the processor of Transformers that upstream uses.

Logits are (N, V), one row a request; knobs are (N, 1) tensors of the same dtype, so that requests may differ and a
captured graph may be replayed with other values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..arguments import number, whole


@dataclass(frozen=True)
class SamplingParameters:
    """The knobs of one request. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch their filter off.

    Raises:
        InvalidRequestError: a knob is no number, not finite, or out of its range.
    """

    temperature: float = 0.8
    repetition_penalty: float = 1.2
    min_p: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty", "min_p", "top_p"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        object.__setattr__(self, "guidance", number("cfg_weight", self.guidance))
        object.__setattr__(self, "top_k", whole("top_k", self.top_k))


class Knobs:
    """The parameters of N requests as columns (N, 1) of static tensors, and what the host knows of them.

    Attributes:
        guidance, temperature, penalty, min_p, tail, top_k, greedy_rows: the columns. A temperature of 0 stands for
            greedy decoding, which does not look at the quotient. ``tail`` is 1 - top_p.
        greedy: which requests are greedy, on the host.
        filters: which filters are needed at all, and so what a graph depends on.
    """

    def __init__(self, requests: Sequence[SamplingParameters], dtype: torch.dtype, device: torch.device):
        # of half-precision logits in fp32: torch rounds a quotient by a Python number once, and not the number
        wide = dtype if dtype.itemsize > 2 else torch.float32
        with torch.inference_mode(False):
            self._numbers = torch.empty((5, len(requests), 1), dtype=wide, device=device)
            self._integers = torch.empty((2, len(requests), 1), dtype=torch.long, device=device)
        self.set(requests, len(requests))

    def set(self, requests: Sequence[SamplingParameters], rows: int) -> None:
        """Other requests, in the first of ``rows`` rows, without a wait for the device; at most as many as at first."""
        each = [*requests, *[_NEUTRAL] * (rows - len(requests))]
        # tail: subtracted before the rounding to the logits' dtype, as TopPLogitsWarper does
        numbers = [(r.guidance, r.temperature or 1.0, r.repetition_penalty, r.min_p, 1.0 - r.top_p) for r in each]
        integers = [(r.top_k, r.temperature == 0.0) for r in each]
        for static, values in ((self._numbers, numbers), (self._integers, integers)):
            host = torch.tensor(values, dtype=static.dtype, device="cpu").t()[..., None].contiguous()
            static[:, :rows].copy_(host.pin_memory() if static.is_cuda else host, non_blocking=True)
        self.guidance, self.temperature, self.penalty, self.min_p, self.tail = self._numbers[:, :rows]
        self.top_k, self.greedy_rows = self._integers[:, :rows]
        self.any_temperature = any(r.temperature not in (0.0, 1.0) for r in requests)
        self.any_penalty = any(r.repetition_penalty != 1.0 for r in requests)
        self.any_min_p = any(r.min_p > 0.0 for r in requests)
        self.any_top_p = any(r.top_p < 1.0 for r in requests)
        largest = max(r.top_k for r in requests)
        self.largest_k = 1 << (largest - 1).bit_length() if largest > 0 else 0  # few values: each is another graph
        self.greedy = [r.temperature == 0.0 for r in requests]
        self.filters = (
            self.any_temperature, self.any_penalty, self.any_min_p, self.any_top_p, self.largest_k,
            any(self.greedy), all(self.greedy),
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The static tensors."""
        return self._numbers, self._integers


_NEUTRAL = SamplingParameters(temperature=1.0, repetition_penalty=1.0)


def guide(logits: Tensor, weight: Tensor) -> Tensor:
    """Classifier-free guidance: (N, 2, V), conditional and unconditional, to (N, V); (N, 1, V) passes through."""
    if logits.size(1) == 1:
        return logits[:, 0]
    conditional, unconditional = logits.unbind(dim=1)
    return conditional + weight.to(logits.dtype) * (conditional - unconditional)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of ids that are ``seen`` (N, V) by ``penalty`` (CTRL, 2019)."""
    multiplied = (logits * penalty).to(logits.dtype)
    return torch.where(seen, torch.where(logits < 0, multiplied, divide(logits, penalty)), logits)


def divide(logits: Tensor, divisor: Tensor) -> Tensor:
    """``logits / divisor``, rounded as torch rounds a division by a Python number on the same device."""
    # CUDA kernels multiply by the reciprocal of a number that the host holds
    quotient = logits * divisor.reciprocal() if logits.is_cuda else logits / divisor
    return quotient.to(logits.dtype)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop ids less likely than ``min_p`` times the likeliest one, which itself always stays."""
    probabilities = torch.softmax(logits, dim=-1)
    floor = (min_p * probabilities.amax(dim=-1, keepdim=True)).to(logits.dtype)
    return logits.masked_fill(probabilities < floor, -float("inf"))


def keep_top_k(logits: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """Keep the ``top_k`` likeliest ids and what ties with the last of them; rows with 0 keep all.

    ``largest``: no ``top_k`` is greater; known to the host.
    """
    best = torch.topk(logits, min(largest, logits.size(-1)))[0]
    threshold = best.gather(-1, (top_k - 1).clamp(0, best.size(-1) - 1))
    return logits.masked_fill((logits < threshold) & (top_k > 0), -float("inf"))


def keep_top_p(logits: Tensor, tail: Tensor) -> Tensor:
    """Keep the smallest set of likeliest ids whose probability reaches 1 - ``tail`` (nucleus sampling, 2019)."""
    ascending, order = torch.sort(logits, descending=False)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= tail.to(logits.dtype)
    drop[..., -1:] = False
    return logits.masked_fill(drop.scatter(1, order, drop), -float("inf"))


def fill_noise(noise: Tensor, generators: Sequence[Generator | None], skip: Sequence[bool] = ()) -> None:
    """Random numbers for ``draw`` into the first rows of (N or more, V), each from its own generator.

    ``None`` is the global one. Rows in ``skip`` keep what they have. Consumes what ``torch.multinomial(row, 1)`` does.
    """
    for row, generator in enumerate(generators):
        if not (skip and skip[row]):
            noise[row : row + 1].exponential_(1, generator=generator)


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """One id (N, 1) a row, the winner of an exponential race.

    Yields what ``torch.multinomial(row, 1)`` does, without its check of the probabilities, which waits for the device.
    """
    return (probabilities / noise).argmax(dim=-1, keepdim=True)


def filter_guided(logits: Tensor, seen: Tensor, knobs: Knobs) -> Tensor:
    """Logits as upstream's Llama models draw from them: penalty, temperature, min-p, top-p (``T3.inference``)."""
    if knobs.any_penalty:
        logits = penalize_repetition(logits, seen, knobs.penalty)
    if knobs.any_temperature:
        logits = divide(logits, knobs.temperature)
    if knobs.any_min_p:
        logits = keep_min_p(logits, knobs.min_p)
    # at 1.0 nothing with a probability above zero would go, so the sort over the vocabulary is left out
    return keep_top_p(logits, knobs.tail) if knobs.any_top_p else logits


def filter_unguided(logits: Tensor, seen: Tensor, knobs: Knobs) -> Tensor:
    """Logits as upstream's GPT-2 models draw from them: temperature, top-k, top-p, penalty (``inference_turbo``)."""
    if knobs.any_temperature:
        logits = divide(logits, knobs.temperature)
    if knobs.largest_k > 0:
        logits = keep_top_k(logits, knobs.top_k, knobs.largest_k)
    if knobs.any_top_p:
        logits = keep_top_p(logits, knobs.tail)
    return penalize_repetition(logits, seen, knobs.penalty) if knobs.any_penalty else logits


DRAWN, IMPOSSIBLE, EXHAUSTED = 0, 1, 2


def sample(logits: Tensor, knobs: Knobs, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N, 1) int64 from filtered logits, and a status (N, 1) int64 for each, without a host sync.

    ``DRAWN``; ``IMPOSSIBLE``: the logits hold NaN or positive infinity; ``EXHAUSTED``: every id is excluded.
    Requests with temperature 0 take the likeliest id. ``noise``: (N, V) of ``fill_noise``.
    """
    excluded = (logits == -float("inf")).all(dim=-1, keepdim=True)
    probabilities = torch.softmax(logits, dim=-1)
    broken = probabilities.isnan().any(dim=-1, keepdim=True)
    status = torch.where(excluded, EXHAUSTED, torch.where(broken, IMPOSSIBLE, DRAWN))
    if not any(knobs.greedy):
        return draw(probabilities, noise), status
    likeliest = logits.argmax(dim=-1, keepdim=True)
    if all(knobs.greedy):
        return likeliest, status
    return torch.where(knobs.greedy_rows > 0, likeliest, draw(probabilities, noise)), status
