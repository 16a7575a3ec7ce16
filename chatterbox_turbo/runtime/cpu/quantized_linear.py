"""Products with quantized matrices in torch's terms: few rows by kernels of their own, many by plain blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import prange, types
from numba.extending import overload
from torch import Tensor

from ..device.quantized import QuantizedMatrix
from . import instructions
from .arrays import array, arrays
from .instructions import jit, narrow, widen
from .onednn import linear
from .products import operand, project
from .threads import kernel_threads

FEW = 16  # rows up to which reading the weights is the limit, and not arithmetic
BLOCK_BYTES = 2**20  # of plain weights at a time: they stay in the second-level cache
NO_BIAS = np.empty(0, np.float32)


def quantized_linear(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    """``x @ weight.T`` in the format of ``x``: (…, in) to (…, out) on a CPU, by int8 or int4; no derivative.

    Up to ``FEW`` rows are independent of each other. For more of them a block of the matrix after the other is made
    plain, in the format of ``x``, and multiplied by whatever is fastest for that: the whole is never copied.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, matrix.dequantize(x.dtype))
    outputs, inner = matrix.shape
    flat = x.detach().reshape(-1, inner)
    few = 0 < len(flat) <= FEW
    if few or x.dtype not in (torch.float32, torch.bfloat16):
        y = (_few if few else _many)(matrix, flat.float().contiguous())
    else:
        y = _many(matrix, flat)
    return y.view(*x.shape[:-1], outputs).to(x.dtype)


def _few(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    w, y = arrays(matrix), x.new_empty(len(x), matrix.size(0))
    with kernel_threads() as threads:
        project(w, NO_BIAS, prepare(x.numpy(), w, scratch(*x.shape)), y.numpy(), threads)
    return y


def _many(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    (outputs, inner), w = matrix.shape, arrays(matrix)
    rows = min(max(BLOCK_BYTES // (inner * x.element_size()), 1), outputs)
    y, block = x.new_empty(len(x), outputs), x.new_empty(rows, inner)
    for first in range(0, outputs, rows):
        some = block[: outputs - first]
        with kernel_threads():
            _make_plain(w, first, array(some))
        y[:, first : first + rows] = linear(x, some)
    return y


def scratch(rows: int, inner: int) -> tuple[Any, ...]:
    """What ``operand`` writes to for activations (rows, inner), in this processor's way of multiplying."""
    integers = instructions.multiplies_integers()
    formats = (torch.int16, torch.int8) if integers else (torch.float32, torch.float32)
    # by torch, whose blocks begin with a line of the cache
    numbers = (torch.empty((rows, inner) if integers else (0, 0), dtype=dtype).numpy() for dtype in formats)
    factors, sums = (torch.empty(rows, inner // 64).numpy() for _ in range(2))
    return np.empty((0, 0), np.float32), (*numbers, factors, sums)


@jit()
def prepare(x, w, low):
    """``operand``, for callers outside of kernels."""
    return operand(x, w, low)


def _make_row_plain(w, n, row):
    """``row`` (K,) fp32 or bf16: the weights of output n."""


@overload(_make_row_plain)
def _choose_making(w, n, row):
    if w[0].dtype == types.int8:

        def int8(w, n, row):
            codes, scales = w[0][n], w[1][n]
            for g in range(scales.size):
                scale = widen(scales[g])
                for k in range(128 * g, 128 * g + 128):
                    row[k] = narrow(np.float32(codes[k]) * scale, row[k])

        return int8

    def int4(w, n, row):
        codes, scales, zeros = w[0][n], w[1][n], w[2][n]
        for g in range(scales.size):
            scale, zero = widen(scales[g]), widen(zeros[g])
            shift = np.uint8(4 * (g % 2))
            packed, some = codes[64 * (g // 2) : 64 * (g // 2) + 64], row[64 * g : 64 * g + 64]
            for k in range(64):
                code = np.float32((packed[k] >> shift) & np.uint8(15))
                some[k] = narrow((code - zero) * scale, some[k])

    return int4


@jit(parallel=True)
def _make_plain(w, first, plain):
    """``plain`` (rows, K) fp32 or bf16: the weights of as many outputs from ``first`` on."""
    for n in prange(plain.shape[0]):
        _make_row_plain(w, first + n, plain[n])
