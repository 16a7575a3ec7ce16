"""Which mel frames S3Gen's flow makes and its vocoder is given, read from upstream's own function."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..runtime.s3gen.vocos_network import MelDescription
from .patch_points import digest

# of ``mel_spectrogram`` (models/s3gen/utils/mel.py): Hann window, reflected ends, magnitudes, librosa's default filters
_CODE = "93afd03b4a17"


def defaults(extractor: Any) -> dict[str, Any] | None:
    """Upstream's default arguments of its mel spectrogram by name, or ``None`` where its code is not a known one."""
    if digest(extractor) != _CODE:
        return None
    parameters = inspect.signature(inspect.unwrap(extractor)).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def describe(s3gen: nn.Module) -> MelDescription | None:
    """The mel frames of an ``S3Gen`` as it calls its ``mel_extractor``, by default arguments; ``None``: unknown."""
    extractor = getattr(s3gen, "mel_extractor", None)
    own = defaults(extractor)
    if own is None:
        return None
    compress = inspect.unwrap(extractor).__globals__["dynamic_range_compression_torch"]  # a natural logarithm
    return MelDescription(
        sample_rate=own["sampling_rate"],
        bands=own["num_mels"],
        hop=own["hop_size"],
        window=own["win_size"],
        n_fft=own["n_fft"],
        fmin=float(own["fmin"]),
        fmax=float(own["fmax"]),
        log="e",
        floor=inspect.signature(compress).parameters["clip_val"].default,
        centre=own["center"],
        padding="reflect",
        power=1.0,
        scale="slaney",
        norm="slaney",
    )
