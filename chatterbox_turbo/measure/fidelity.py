"""Measuring whether optimized speech is upstream's speech: the proof behind each fidelity class.

Tests, ``verify`` and ``demo`` use the same functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..api import optimized
from ..config import Config, Fidelity
from ..errors import TurboError
from ..handle import refresh
from ..instruments import recording
from ..passes.base import Pass
from ..passes.watermark import detected
from ..runtime.device.tf32 import full_precision
from ..upstream.families import Parts, identify
from .beside import beside_upstream

NUMERICAL_SNR_DB = 60.0


@dataclass(frozen=True)
class Sample:
    """One generation: ids of T3 (1, n) int64 (``None`` for voice conversion), samples (1, m) float32, seconds.

    ``memory``: what the request and its phases needed, one of ``Meter.history``.
    """

    tokens: Tensor | None
    wav: Tensor
    phases: dict[str, float]
    seconds: float
    memory: dict[str, Any] = field(default_factory=lambda: {"phases": []})


@dataclass(frozen=True)
class Comparison:
    """An optimized sample against upstream's for the same input and seed.

    ``snr_db`` is infinite for equal samples and minus infinity where the lengths differ. ``kinds``: what the
    two tensors are (``kind_of``), where they are not of one kind; otherwise empty.
    """

    token_agreement: float  # share of equal ids, over the longer sequence
    first_mismatch: int | None
    snr_db: float
    watermarked: bool
    kinds: str = ""

    def broken(self, promise: Fidelity) -> str:
        """How the promise is broken, or an empty string. A lossy promise is its published figures, not a bound."""
        if not self.watermarked:
            return "PerTh's detector does not find the watermark"
        if promise != "lossy" and self.first_mismatch is not None:
            return f"speech tokens differ from step {self.first_mismatch} on ({self.token_agreement:.1%} agree)"
        if promise != "lossy" and self.kinds:
            return f"the output is {self.kinds}"
        if promise == "exact" and not math.isinf(self.snr_db):
            return f"samples differ ({self.snr_db:.0f} dB SNR)"
        if promise != "lossy" and self.snr_db < NUMERICAL_SNR_DB:
            return f"samples differ ({self.snr_db:.0f} dB SNR, {NUMERICAL_SNR_DB:.0f} promised)"
        return ""


def arguments(parts: Parts, text: str, language: str = "en", audio: str | None = None) -> dict[str, Any]:
    """The keyword arguments with which this family's ``generate`` speaks ``text`` (or converts ``audio``)."""
    if parts.family == "vc":
        return {"audio": audio}
    return {"text": text, "language_id": language} if parts.family == "multilingual" else {"text": text}


def sample(model: Any, seed: int, request: dict[str, Any]) -> Sample:
    """One call of ``generate`` after seeding the global generator.

    Raises:
        TurboError: the model has a T3, but nothing could be recorded of it, so that nothing would be compared.
    """
    parts = identify(model)
    refresh(model)  # before the recorder's timers lie on top
    with recording(parts) as recorder:
        torch.manual_seed(seed)
        with recorder.meter.request("generate"):
            start = time.perf_counter()
            wav = model.generate(**request)
            seconds = time.perf_counter() - start
    if parts.t3 is not None and recorder.tokens is None:
        raise TurboError("The speech tokens could not be recorded.", f"Unknown patch points: {recorder.missing}.")
    return Sample(recorder.tokens, wav, recorder.timer.seconds(), seconds, recorder.meter.history()[-1])


def compare_samples(model: Any, ours: Sample, reference: Sample) -> Comparison:
    """Tokens, samples, watermark and kind of ``ours`` against upstream's ``reference``."""
    agreement, mismatch = compare_tokens(ours.tokens, reference.tokens)
    watermarked = detected(identify(model).watermarker, ours.wav, model.sr)
    kind, expected = kind_of(ours.wav), kind_of(reference.wav)
    kinds = "" if kind == expected else f"{kind}, upstream's {expected}"
    return Comparison(agreement, mismatch, snr_db(ours.wav, reference.wav), watermarked, kinds)


def compare(
    model: Any,
    config: Config,
    requests: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    passes: Sequence[Pass] = (),
) -> list[Comparison]:
    """Every request with every seed, by upstream and optimized; the model is left as it was.

    Both without TF32, which convolutions on CUDA use by default: upstream's samples then differ from themselves by
    about 53 dB, with noise of 1e-7 on its input. A pass that asks for TF32 has it.
    """
    config = beside_upstream(model, config, requests, passes).config
    pairs = [(request, seed) for request in requests for seed in seeds]
    with full_precision():
        references = [sample(model, seed, request) for request, seed in pairs]
        with optimized(model, config, passes=passes):
            ours = [sample(model, seed, request) for request, seed in pairs]
    return [compare_samples(model, a, b) for a, b in zip(ours, references, strict=True)]


def compare_tokens(ours: Tensor | None, reference: Tensor | None) -> tuple[float, int | None]:
    """Share of equal ids over the longer of two sequences, and the index of the first difference."""
    if ours is None and reference is None:  # voice conversion
        return 1.0, None
    if ours is None or reference is None:
        return 0.0, 0
    a, b = ours.flatten(), reference.flatten()
    shared, longest = min(len(a), len(b)), max(len(a), len(b), 1)
    equal = a[:shared] == b[:shared]
    if len(a) == len(b) and bool(equal.all()):
        return 1.0, None
    differing = (~equal).nonzero()
    return float(equal.sum()) / longest, int(differing[0]) if len(differing) else shared


def kind_of(tensor: Tensor) -> str:
    """What a tensor is apart from its values: number format, device, and how autograd treats it.

    An inference tensor may not be written to or trained through outside of inference mode.
    """
    words = [f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"]
    if tensor.is_inference():
        words.append("as an inference tensor")
    if tensor.requires_grad:
        words.append("with gradients")
    return " ".join(words)


def snr_db(ours: Tensor, reference: Tensor) -> float:
    """Signal-to-noise ratio in dB of ``ours`` against ``reference``, same shape; see ``Comparison``."""
    if ours.shape != reference.shape:
        return -math.inf
    ours, reference = ours.detach().cpu(), reference.detach().cpu()
    noise = (ours.double() - reference.double()).square().sum()
    if noise == 0:
        return math.inf
    return float(10 * torch.log10(reference.double().square().sum() / noise))
