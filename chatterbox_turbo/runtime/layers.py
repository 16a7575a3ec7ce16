"""The two layers that every network here is made of, as records of weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .device.quantized import QuantizedMatrix


@dataclass(frozen=True)
class Norm:
    """RMSNorm where there is no bias (Llama), LayerNorm where there is one (GPT-2)."""

    weight: Tensor  # (D,)
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias``."""

    weight: Tensor | QuantizedMatrix  # (out, in), rows contiguous
    bias: Tensor | None = None  # (out,)
