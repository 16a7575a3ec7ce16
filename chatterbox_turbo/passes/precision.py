"""Number formats. So far TensorFloat-32, which Ampere and later GPUs use for matrix products and convolutions."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from ..runtime.tf32 import tf32
from .base import Call, Context, Pass


class PrecisionPass(Pass):
    """TF32 while ``generate`` runs; the process-wide switches are put back after each call."""

    name = "precision"
    summary = "TensorFloat-32 while generating (CUDA, capability 8.0 and up)"

    def check(self, context: Context) -> str:
        device = context.parts.device
        if device.type != "cuda":
            return f"TF32 needs a CUDA device, the model is on {device}"
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"TF32 needs capability 8.0, this GPU has {major}.{minor}"

    def apply(self, context: Context) -> str:
        context.scopes.append(scope)
        return ""


@contextmanager
def scope(call: Call):
    """TF32 around one call."""
    with tf32():
        yield
