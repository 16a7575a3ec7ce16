"""How good each half of a model is by itself: both are given upstream's speech tokens, so that no error adds up.

Sampled speech goes another way after the first token that differs, which says nothing about how near the two are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..handle import refresh
from ..runtime.t3.sampling import guide
from ..upstream import t3 as upstream_t3
from ..upstream.conditioning import log_mels
from ..upstream.families import Parts, identify
from .divergence import Divergence, compare_logits
from .fidelity import Comparison, Sample, compare_samples, sample, snr_db

MISSING = object()


@dataclass(frozen=True)
class Reference:
    """What upstream says to a request.

    ``sample``: as it speaks. ``logits``: T3's before each of its tokens, (n, R, V) fp32 before guidance; ``None`` for
    voice conversion. ``wav``: samples (1, m) of these tokens, the random generator seeded after T3.
    """

    sample: Sample
    logits: Tensor | None
    wav: Tensor


@dataclass(frozen=True)
class Quality:
    """A configuration against a ``Reference``.

    ``comparison``: as it speaks with the same seed. ``divergence``: of T3's logits before upstream's tokens, where a
    pass computes T3. ``snr_db``, ``log_mel``: of the samples of upstream's tokens, signal-to-noise ratio and mean
    distance of log-mels (natural logarithm; infinite for another length).
    """

    comparison: Comparison
    divergence: Divergence | None
    snr_db: float
    log_mel: float


def reference_of(model: Any, request: dict[str, Any], seed: int) -> Reference:
    """A model that is not optimized as the reference of others; two requests, the second without T3."""
    parts, logits = identify(model), []
    if parts.t3 is None:
        only = sample(model, seed, request)
        return Reference(only, None, only.wav)
    hook = upstream_t3.head(parts.t3).register_forward_hook(lambda _, __, out: logits.append(out[:, -1].float().cpu()))
    try:
        spoken = sample(model, seed, request)
    finally:
        hook.remove()
    before = torch.stack(logits[: spoken.tokens.numel()])
    return Reference(spoken, before, _speak_given(model, request, spoken.tokens, seed))


def quality_of(model: Any, request: dict[str, Any], seed: int, ours: Sample, reference: Reference) -> Quality:
    """How near an optimized model is to the reference; ``ours``: what it said to the same request and seed."""
    parts, comparison = identify(model), compare_samples(model, ours, reference.sample)
    wav, divergences = ours.wav, []
    if parts.t3 is not None:
        refresh(model)
        engine = getattr(getattr(model, "turbo", None), "token_model", None)

        def ask(*args: Any, **kwargs: Any) -> None:
            asked = engine.request(*args, **kwargs)
            given = engine.logits(asked, reference.sample.tokens.flatten().tolist())
            expected = guide(reference.logits, torch.tensor([[asked.knobs.guidance]]))
            divergences.append(compare_logits(given.cpu(), expected))

        tokens = reference.sample.tokens.to(parts.device)
        wav = _speak_given(model, request, tokens, seed, ask if engine is not None else None)
    distance = float("inf")
    if wav.shape == reference.wav.shape:
        a, b = (log_mels(parts.s3gen, one.detach().float().cpu()) for one in (wav, reference.wav))
        distance = (a - b).abs().mean().item()
    return Quality(comparison, *(divergences or [None]), snr_db(wav, reference.wav), distance)


def _speak_given(
    model: Any, request: dict[str, Any], tokens: Tensor, seed: int, ask: Callable[..., None] | None = None
) -> Tensor:
    """Samples of given tokens (1, n); ``ask`` gets the arguments of T3."""

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        if ask is not None:
            ask(*args, **kwargs)
        torch.manual_seed(seed)
        return tokens

    with _answering(model, identify(model), answer):
        return model.generate(**request)


@contextmanager
def _answering(model: Any, parts: Parts, answer: Callable[..., Tensor]) -> Iterator[None]:
    """``answer`` in T3's place."""
    engine = getattr(getattr(model, "turbo", None), "token_model", None)
    if engine is not None:
        with engine.calls.diverted(answer):
            yield
        return
    own, name = vars(parts.t3), upstream_t3.entrance(parts.t3)
    before = own.get(name, MISSING)
    own[name] = answer
    try:
        yield
    finally:
        own.pop(name) if before is MISSING else own.update({name: before})
