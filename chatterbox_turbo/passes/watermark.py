"""The guard: every output of ``generate`` carries PerTh's watermark, whatever else is optimized."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import WatermarkWarning
from ..runtime.voice.reference_audio import resample
from ..upstream.patch_points import check, patch_points
from ..upstream.watermarker import MarkingOnDevice, ObservedWatermarker, why_not_observed, why_not_perth
from .base import Call, Context, Pass


class WatermarkPass(Pass):
    """Watches the watermarker during each call; an output that missed it is marked, with a warning.

    The network runs in inference mode (upstream's Turbo model calls it outside and builds an autograd graph), and what
    is around it without librosa. With ``device = "model"`` a copy of it runs on the model's device.
    """

    name = "watermark"
    summary = "no output without PerTh's watermark; no autograd graph while it is applied"
    # not generate: whoever has patched that, its output is looked at
    patch_points = ("watermarker.apply_watermark", "watermarker.get_watermark")

    def check(self, context: Context) -> str:
        return why_not_perth(context.parts.watermarker) or why_not_observed(context.parts.model)

    def apply(self, context: Context) -> str:
        model, perth = context.parts.model, context.parts.watermarker
        detect = context.config.watermark.detect
        on_device, remark = _on_device(context)
        if on_device is not None:
            context.holdings["watermark copy"] = on_device
        marked = 0

        @torch.inference_mode()
        def mark(apply, signal, sample_rate, options):
            nonlocal marked
            marked += 1
            if not _is_audio(signal):
                return apply(signal, sample_rate=sample_rate, **options)
            if on_device is not None and sample_rate == model.sr:
                return on_device(signal)
            return _at_own_rate(apply, perth.perth_net.hp.sample_rate, signal, sample_rate, options)

        @contextmanager
        def scope(call: Call):
            nonlocal marked
            marked = 0
            yield
            if not (torch.is_tensor(call.result) and call.result.is_floating_point() and call.result.numel()):
                if marked == 0:  # the result of a fork's generate, or of an app's around it
                    kind = type(call.result).__name__
                    warnings.warn(f"No watermark was applied to this {kind}.", WatermarkWarning, stacklevel=2)
                return
            if marked == 0 or (detect and not detected(perth, call.result, model.sr)):
                warnings.warn("An output had no watermark and was marked now.", WatermarkWarning, stacklevel=2)
                channels = _channels(call.result)
                signals = [mark(perth.apply_watermark, channel, model.sr, {}) for channel in channels]
                call.result = torch.from_numpy(np.stack(signals)).reshape(call.result.shape).to(call.result)

        context.journal.set(model, "watermarker", ObservedWatermarker(perth, mark), yields=True)
        context.scopes.append(scope)
        return remark


def _on_device(context: Context) -> tuple[MarkingOnDevice | None, str]:
    """What marks on the model's device, where that is asked for and can be done, and a remark."""
    parts, section = context.parts, context.config.watermark
    if section.device == "perth":
        return None, ""
    finding = check(parts, patch_points(parts.family)["watermarker.apply_watermark"], context.journal)
    if finding.problem and section.enabled is not True:
        return None, f"marked where PerTh's network is: {finding.problem}"
    return MarkingOnDevice(parts.watermarker, parts.model.sr, parts.device), f"marked on {parts.device}"


def _is_audio(signal: Any) -> bool:
    """Whether it is finite samples (n,), float32 or float64; what PerTh makes of anything else is left to PerTh."""
    return (
        isinstance(signal, np.ndarray)
        and signal.ndim == 1
        and signal.dtype in (np.float32, np.float64)
        and bool(np.isfinite(signal).all())
    )


def _at_own_rate(apply: Callable, rate: int, signal: np.ndarray, sample_rate: int, options: dict[str, Any]) -> Any:
    """Samples (n,) marked; resampled here to the network's ``rate`` and back, as PerTh does, but without librosa.

    The first call of librosa's compiles its functions with numba: 8 s where no earlier process has, as in a container.
    """
    marked = apply(resample(signal, sample_rate, rate), sample_rate=rate, **options)
    return resample(marked, rate, sample_rate)


def _channels(wav: torch.Tensor) -> np.ndarray:
    """Samples (..., n) as float32 (channels, n) on the CPU."""
    return wav.detach().reshape(-1, wav.shape[-1]).float().cpu().numpy()


@torch.inference_mode()
def detected(perth, wav: torch.Tensor, sample_rate: int) -> bool:
    """Whether PerTh's own detector finds its mark in every channel of (..., n) floating-point samples."""
    return all(perth.get_watermark(each, sample_rate=sample_rate).mean() == 1.0 for each in _channels(wav))
