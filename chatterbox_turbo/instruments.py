"""Looking at a model at work: phase timings, memory by phase, the speech tokens of the last call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .patching import Journal
from .runtime import forks
from .runtime.device.timing import PhaseTimer
from .runtime.memory.meter import Meter
from .upstream.families import Parts
from .upstream.patch_points import check, owner_of, patch_points
from .upstream.watermarker import ObservedWatermarker, why_not_observed

# Phase by the patch point that it spans.
PHASES = {
    "prepare_conditionals": "conditionals",
    "set_target_voice": "conditionals",
    "t3.inference": "t3",
    "t3.inference_turbo": "t3",
    "s3gen.flow_inference": "flow",
    "s3gen.hift_inference": "vocoder",
}


@dataclass
class Recorder:
    """What the last ``generate`` did: seconds by phase, and the ids that T3 produced (1, n), int64.

    ``meter``: memory by phase, of all requests so far.
    """

    timer: PhaseTimer
    meter: Meter
    tokens: Tensor | None = None
    missing: list[str] = field(default_factory=list)  # phases whose patch point does not fit
    active: bool = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forget the last call and record what happens in the body; calls outside of one leave no record."""
        self.timer.clear()
        self.tokens, self.active = None, True
        with forks.undoing(partial(setattr, self, "active", False)):
            yield


def install_recorder(parts: Parts, journal: Journal, exact_peaks: bool = False) -> Recorder:
    """Put timers around the phases of one model; what does not fit is left alone and named in ``missing``.

    ``exact_peaks``: as for ``Meter``.
    """
    recorder = Recorder(PhaseTimer(parts.device), Meter(parts.device, exact_peaks))
    points = patch_points(parts.family)
    for path, phase in PHASES.items():
        if path not in points:
            continue
        finding = check(parts, points[path], journal)
        if finding.problem and not finding.forceable:
            recorder.missing.append(phase)
            continue
        owner, name = owner_of(parts, path)
        journal.wrap(owner, name, _timed(recorder, phase))
    if why_not_observed(parts.model):
        recorder.missing.append("watermark")
    elif parts.watermarker is not None:
        timed = ObservedWatermarker(parts.watermarker, _timed_watermark(recorder))
        journal.set(parts.model, "watermarker", timed, yields=True)
    return recorder


def _timed(recorder: Recorder, phase: str):
    def around(wrapped, instance, args, kwargs):
        if not recorder.active:  # voices are prepared outside of requests too
            with recorder.meter.phase(phase) if phase == "conditionals" else nullcontext():
                return wrapped(*args, **kwargs)
        with recorder.meter.phase(phase), recorder.timer.phase(phase):
            result = wrapped(*args, **kwargs)
        if phase == "t3" and torch.is_tensor(result):
            recorder.tokens = torch.atleast_2d(result).detach()
        return result

    return around


def _timed_watermark(recorder: Recorder):
    def around(apply, signal, sample_rate, options):
        if not recorder.active:
            return apply(signal, sample_rate=sample_rate, **options)
        with recorder.meter.phase("watermark"), recorder.timer.phase("watermark"):
            return apply(signal, sample_rate=sample_rate, **options)

    return around


@contextmanager
def recording(parts: Parts) -> Iterator[Recorder]:
    """Record the calls made inside, of a model with or without optimizations."""
    journal = _OnTop()
    try:
        recorder = install_recorder(parts, journal)
        with recorder.recording():
            yield recorder
    finally:
        journal.undo()


class _OnTop(Journal):
    """A journal for a short visit: whatever is patched already counts as own, and is put back at the end."""

    def owns(self, owner: Any, name: str) -> bool:
        return True
