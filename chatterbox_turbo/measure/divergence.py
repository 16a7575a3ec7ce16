"""What half precision and quantization do to T3: its logits against others', over the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..api import optimized
from ..config import Config

FP32 = {"decoding": {"enabled": True, "progress": "off", "backbone": "static"}}


@dataclass(frozen=True)
class Divergence:
    """Over the steps of one utterance: Kullback-Leibler divergence (nats), and agreement of the likeliest id.

    ``agreement``: share of steps with the same likeliest id; ``in_top_5``: with the other's among the likeliest five.
    """

    steps: int
    mean: float
    largest: float
    agreement: float
    in_top_5: float

    def __str__(self) -> str:
        return (
            f"KL {self.mean:.1e} (largest {self.largest:.1e}), top-1 agreement {self.agreement:.1%}, "
            f"in top 5 {self.in_top_5:.1%}, over {self.steps} steps"
        )


def token_divergence(
    model: Any, config: Config, request: dict[str, Any], seed: int = 0, reference: Config = FP32
) -> Divergence:
    """Speak ``request`` by the reference, then ask both for the logits before each of its tokens (teacher forcing).

    Args:
        model: one that speaks, in fp32 and not optimized.
        config: what is compared; the static backbone on both sides.
        request: keyword arguments of ``generate``.
        reference: what it is compared with.
    """
    tokens, expected = spoken(model, reference, request, seed)
    return compare_logits(logits_over(model, config, request, tokens), expected)


def compare_logits(given: Tensor, expected: Tensor) -> Divergence:
    """``given`` against ``expected``, both (n, V)."""
    reference = torch.log_softmax(expected.double(), -1)
    divergence = (reference.exp() * (reference - torch.log_softmax(given.double(), -1))).sum(-1)
    likeliest = expected.argmax(-1, keepdim=True)
    return Divergence(
        steps=len(expected),
        mean=divergence.mean().item(),
        largest=divergence.max().item(),
        agreement=(given.argmax(-1, keepdim=True) == likeliest).double().mean().item(),
        in_top_5=(given.topk(5).indices == likeliest).any(-1).double().mean().item(),
    )


def spoken(model: Any, config: Config, request: dict[str, Any], seed: int = 0) -> tuple[list[int], Tensor]:
    """What the model speaks with a configuration: n tokens, and the logits (n, V) before each of them."""
    found: list[Tensor] = []

    def speak(*args: Any, **kwargs: Any) -> Tensor:
        (tokens,) = engine.run([engine.request(*args, **kwargs)])
        found.extend([tokens, engine.logits(engine.request(*args, **kwargs), tokens[0].tolist())])
        return tokens

    with optimized(model, config):
        engine = model.turbo.token_model
        with engine.calls.diverted(speak):
            torch.manual_seed(seed)
            model.generate(**request)
    return found[0][0].tolist(), found[1]


def logits_over(model: Any, config: Config, request: dict[str, Any], tokens: list[int]) -> Tensor:
    """The logits (n, V) before each of n given tokens, with a configuration (teacher forcing)."""
    found: list[Tensor] = []

    def read(*args: Any, **kwargs: Any) -> Tensor:
        found.append(engine.logits(engine.request(*args, **kwargs), tokens))
        return torch.tensor([tokens], device=found[0].device)

    with optimized(model, config):
        engine = model.turbo.token_model
        with engine.calls.diverted(read):
            model.generate(**request)
    return found[0]
