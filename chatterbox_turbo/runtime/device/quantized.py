"""Matrices of integers with a scale for each group of inputs, and the module that holds one in upstream's place.

A product with one row per sequence takes as long as its weights take to read, so that fewer bits a weight are faster as
well as smaller. Activations keep their format: only what lies in memory is rounded (weight-only quantization).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED = 64  # bytes of int4 in which low nibbles come before high ones


@dataclass(frozen=True)
class Scheme:
    """How numbers are written.

    Attributes:
        bits: of a code.
        group: neighbouring inputs that share a scale.
        multiple: of which the number of inputs must be one.
        table: the numbers that codes stand for (16,), where they are not the codes themselves.
    """

    name: str
    bits: int
    group: int
    multiple: int
    table: Callable[[], Tensor] | None = None

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix (rows, columns): codes, scales and zeros."""
        scale = 2 if self.table is None else 4
        zero = 2 if self.table is None and self.bits < 8 else 0
        return rows * (columns * self.bits // 8 + columns // self.group * (scale + zero))


@cache
def normal_floats() -> Tensor:
    """NF4: the quantiles of a normal distribution, zero among them, scaled to 1 (QLoRA, 2023, appendix E)."""
    outermost = 0.9677083
    # in fp32 and on the CPU, whatever a caller has made the default: it is kept
    halves = (torch.linspace(outermost, 0.5, steps, dtype=torch.float32, device="cpu")[:-1] for steps in (9, 8))
    positive, negative = torch.special.ndtri(torch.cat(list(halves)).double()).split([8, 7])
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    values = torch.cat([-negative, zero, positive]).float().sort().values
    return values / values.max()  # in fp32: bitsandbytes' numbers to the bit


@cache
def four_bit_floats() -> Tensor:
    """FP4: a sign, two bits of exponent and one of mantissa, the largest 1 (bitsandbytes' order of codes)."""
    twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    positive = torch.tensor(twelfths, dtype=torch.float32, device="cpu") / 12
    return torch.cat([positive, -positive])


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, 128, 128),
        Scheme("int4", 4, 64, 2 * PACKED),
        Scheme("nf4", 4, 64, 64, normal_floats),
        Scheme("fp4", 4, 64, 64, four_bit_floats),
    )
}


@cache
@torch.inference_mode(False)
def table_on(scheme: str, device: torch.device) -> Tensor:
    """The numbers (16,) fp32 of a scheme that has a table; copied once a device, since a captured step may not wait."""
    return SCHEMES[scheme].table().to(device)


Multiply = Callable[["QuantizedMatrix", Tensor], Tensor]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (out, in), which answers for its shape, device and format as a tensor of weights does.

    Attributes:
        codes: int8 (out, in) of int8; else uint8 (out, in / 2). Of int4, 64 bytes hold 128 inputs: the first 64 in the
            low nibbles, the others in the high ones. Of nf4 and fp4 a byte holds two neighbours, the first in the high
            nibble (bitsandbytes' order).
        scales: (out, in / group), bf16 of int8 and int4, fp32 of nf4 and fp4.
        zeros: bf16 (out, in / group) of int4, where ``weight = (code - zero) * scale``; else ``None``.
        dtype: the format of activations and results.
        by: ``by(matrix, x)`` computes the product without a bias; plain torch where it is ``None``.
    """

    scheme: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    dtype: torch.dtype = torch.float32
    by: Multiply | None = None

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        rows, columns = self.codes.shape
        return torch.Size((rows, columns * 8 // SCHEMES[self.scheme].bits))

    def size(self, dimension: int) -> int:
        """Of (out, in)."""
        return self.shape[dimension]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales and zeros, as far as there are any."""
        return tuple(tensor for tensor in (self.codes, self.scales, self.zeros) if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def data_ptr(self) -> int:
        """The address of the codes."""
        return self.codes.data_ptr()

    def rows(self, first: int, last: int) -> QuantizedMatrix:
        """Views of the outputs from ``first`` up to ``last``."""
        zeros = None if self.zeros is None else self.zeros[first:last]
        return replace(self, codes=self.codes[first:last], scales=self.scales[first:last], zeros=zeros)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) as plain numbers, in the matrix's format if no other is asked for."""
        scheme = SCHEMES[self.scheme]
        numbers = _numbers(self.codes, scheme).unflatten(1, (self.scales.size(1), -1))
        if self.zeros is not None:
            numbers = numbers - self.zeros.float()[..., None]
        return (numbers * self.scales.float()[..., None]).flatten(1).to(dtype or self.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``: (…, in) to (…, out)."""
        if self.by is None:
            return F.linear(x, self.dequantize(x.dtype), bias)
        y = self.by(self, x)
        return y if bias is None else y + bias


def _numbers(codes: Tensor, scheme: Scheme) -> Tensor:
    """What codes stand for, before zeros and scales: (out, in) fp32."""
    if scheme.bits == 8:
        return codes.float()
    low, high = codes & 15, codes >> 4
    if scheme.table is None:
        blocks = (nibbles.unflatten(1, (-1, PACKED)) for nibbles in (low, high))
        return torch.stack(tuple(blocks), dim=2).flatten(1).float()
    return table_on(scheme.name, codes.device)[torch.stack((high, low), dim=2).flatten(1).int()]


def pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes (out, in) from 0 to 15 as ``QuantizedMatrix.codes``; int8's as they are."""
    if scheme.bits == 8:
        return codes.to(torch.int8)
    codes = codes.to(torch.uint8)
    if scheme.table is None:
        low, high = codes.unflatten(1, (-1, 2, PACKED)).unbind(2)
    else:
        high, low = codes.unflatten(1, (-1, 2)).unbind(2)
    return (low | high << 4).reshape(codes.size(0), -1)


class QuantizedLinear(nn.Module):
    """A linear layer whose matrix is quantized; upstream's own code runs through it as through the layer it replaces.

    Its integers and scales are buffers: they move with the model, and casts of the model leave their formats alone.
    """

    def __init__(self, matrix: QuantizedMatrix, by: Multiply | None = None, bias: nn.Parameter | None = None):
        super().__init__()
        self.scheme, self.by = matrix.scheme, by
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("zeros", matrix.zeros)
        self.register_parameter("bias", bias)

    def matrix(self, dtype: torch.dtype) -> QuantizedMatrix:
        """Its matrix, for activations of a format."""
        return QuantizedMatrix(self.scheme, self.codes, self.scales, self.zeros, dtype, self.by)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in) fp32, computed at each access: for code that asks a layer for it."""
        return self.matrix(torch.float32).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out), in the format of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.matrix(x.dtype).multiply(x, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme!r}"

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            result = function(tensor)
            mine = any(tensor is buffer for buffer in (self.codes, self.scales, self.zeros))
            return tensor.to(result.device) if mine and result.dtype != tensor.dtype else result

        return super()._apply(moved, recurse)


def stacked(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """The rows of several matrices one below the other, in new tensors."""
    first = matrices[0]
    zeros = None if first.zeros is None else torch.cat([matrix.zeros for matrix in matrices])
    codes, scales = (torch.cat([getattr(matrix, name) for matrix in matrices]) for name in ("codes", "scales"))
    return replace(first, codes=codes, scales=scales, zeros=zeros)
