"""From logits to one token: pure functions, each equal to the processor of Transformers that upstream uses.

Logits are (1, V) in the model's dtype, token ids (1, n) int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidRequestError


@dataclass(frozen=True)
class SamplingParameters:
    """The knobs of one request. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch their filter off.

    Raises:
        InvalidRequestError: a knob is out of its range.
    """

    temperature: float = 0.8
    repetition_penalty: float = 1.2
    min_p: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0 <= self.temperature < float("inf"), "0 or more"),
            "repetition_penalty": (0.0 < self.repetition_penalty < float("inf"), "above 0"),
            "min_p": (0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            "top_p": (0.0 <= self.top_p <= 1.0, "between 0 and 1"),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}, but must be {wanted}.")


def guide(logits: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance: rows (conditional, unconditional) to (1, V); a single row passes through."""
    if logits.size(0) == 1:
        return logits
    conditional, unconditional = logits[0:1], logits[1:2]
    # rounded to the logits' dtype before the product, as upstream does
    factor = torch.as_tensor(weight, device=logits.device, dtype=logits.dtype)
    return conditional + factor * (conditional - unconditional)


def penalize_repetition(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of ids in ``history`` by ``penalty`` (CTRL, 2019)."""
    seen = torch.gather(logits, 1, history)
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    return logits.scatter(1, history, seen)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop ids less likely than ``min_p`` times the likeliest one, which itself always stays."""
    if min_p <= 0.0:
        return logits
    probabilities = torch.softmax(logits, dim=-1)
    floor = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < floor, -float("inf"))


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the ``top_k`` likeliest ids and what ties with the last of them."""
    if top_k <= 0:
        return logits
    threshold = torch.topk(logits, min(top_k, logits.size(-1)))[0][..., -1, None]
    return logits.masked_fill(logits < threshold, -float("inf"))


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest ids whose probability reaches ``top_p`` (nucleus sampling, 2019).

    At 1.0 nothing with a probability above zero would go, so the sort over the vocabulary is left out.
    """
    if top_p >= 1.0:
        return logits
    ascending, order = torch.sort(logits, descending=False)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)
    drop[..., -1:] = False
    return logits.masked_fill(drop.scatter(1, order, drop), -float("inf"))


def draw(logits: Tensor) -> Tensor:
    """One id (1, 1) from softmax(logits); takes one multinomial draw from the global generator, as upstream."""
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)


def sample_guided(logits: Tensor, history: Tensor, knobs: SamplingParameters) -> Tensor:
    """A token (1, 1) in the order of upstream's Llama models; ``temperature`` 0 takes the likeliest one.

    Source: upstream ``T3.inference``: penalty, temperature, min-p, top-p.
    """
    logits = penalize_repetition(logits, history, knobs.repetition_penalty)
    if knobs.temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    if knobs.temperature != 1.0:
        logits = logits / knobs.temperature
    return draw(keep_top_p(keep_min_p(logits, knobs.min_p), knobs.top_p))


def sample_unguided(logits: Tensor, history: Tensor, knobs: SamplingParameters) -> Tensor | None:
    """A token (1, 1) in the order of upstream's GPT-2 models, or ``None`` where every id is excluded.

    Source: upstream ``T3.inference_turbo``: temperature (0 leaves the logits alone), top-k, top-p, penalty.
    """
    if knobs.temperature not in (0.0, 1.0):
        logits = logits / knobs.temperature
    logits = keep_top_p(keep_top_k(logits, knobs.top_k), knobs.top_p)
    if knobs.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, history, knobs.repetition_penalty)
    if bool((logits == -float("inf")).all()):
        return None
    return draw(logits)
