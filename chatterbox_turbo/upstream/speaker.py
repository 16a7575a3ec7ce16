"""Whose voice samples are, by a model's own encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..runtime.voice.reference_audio import resample
from .families import Parts

ENCODER_RATE = 16_000  # Hz, of either encoder


@torch.inference_mode()
def speaker_vector(parts: Parts, samples: np.ndarray, rate: int) -> Tensor:
    """(e,) fp32 of unit length: upstream's ``VoiceEncoder`` of samples (n,) at ``rate`` Hz.

    Voice conversion has none; there it is S3Gen's own speaker encoder (CAMPPlus).
    """
    low = resample(np.ascontiguousarray(samples, dtype=np.float32), rate, ENCODER_RATE)
    if parts.voice_encoder is not None:
        vector = torch.from_numpy(parts.voice_encoder.embeds_from_wavs([low], sample_rate=ENCODER_RATE)).mean(dim=0)
    else:
        vector = parts.s3gen.speaker_encoder.inference(torch.from_numpy(low)[None].to(parts.device))[0].cpu()
    return torch.nn.functional.normalize(vector.float(), dim=0)
