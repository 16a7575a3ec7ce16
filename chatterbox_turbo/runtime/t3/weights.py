"""The weights of a decoder-only transformer, as the prefill and the step read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..device.quantized import QuantizedMatrix
from ..layers import Linear, Norm


@dataclass(frozen=True)
class Layer:
    """One pre-norm block. ``up`` holds gate and up one below the other, (2 F, D), where the MLP is gated."""

    attention_norm: Norm
    qkv: Linear  # (3 D, D): queries, keys, values one below the other
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """A whole backbone with its head.

    Attributes:
        gated: SiLU(gate) * up (Llama) instead of tanh-approximated GELU (GPT-2).
        inverse_frequencies: (Dh / 2,) fp32 of rotary position embedding, or ``None``.
        rotary_scale: factor on its cosines and sines.
        positions: (n, D) learned position embedding, or ``None``.
    """

    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear  # (V, D)
    heads: int
    gated: bool
    inverse_frequencies: Tensor | None = None
    rotary_scale: float = 1.0
    positions: Tensor | None = None

    @property
    def width(self) -> int:
        """D, the size of a hidden state."""
        return self.head.weight.size(1)

    @property
    def head_width(self) -> int:
        """Dh, the size of one attention head."""
        return self.width // self.heads

    @property
    def dtype(self) -> torch.dtype:
        """The number format of products, and of the matrices that are not quantized."""
        return self.layers[0].qkv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.head.weight.device

    @property
    def capacity(self) -> int | None:
        """Positions that there are embeddings for, or ``None`` where positions have no end."""
        return None if self.positions is None else self.positions.size(0)

    def matrices(self) -> list[Tensor | QuantizedMatrix]:
        """Every matrix that one step reads from end to end."""
        each = [(layer.qkv, layer.out, layer.up, layer.down) for layer in self.layers]
        return [linear.weight for four in each for linear in four] + [self.head.weight]

    def storages(self) -> list[Tensor]:
        """The memory of all of them: quantized ones have several tensors."""
        each = (matrix.tensors if isinstance(matrix, QuantizedMatrix) else (matrix,) for matrix in self.matrices())
        return [tensor for tensors in each for tensor in tensors]

    @property
    def schemes(self) -> tuple[str, ...]:
        """Names of the quantization schemes among the matrices, in alphabetical order."""
        return tuple(sorted({matrix.scheme for matrix in self.matrices() if isinstance(matrix, QuantizedMatrix)}))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (…, Dh / 2) fp32 of positions (…) int64, or ``None`` without rotary embedding."""
        if self.inverse_frequencies is None:
            return None
        angles = positions.float()[..., None] * self.inverse_frequencies
        return angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale
