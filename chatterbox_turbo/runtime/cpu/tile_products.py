"""Transformer blocks of many rows in bf16 by AMX: norms, products, biases, GELU and residuals of 32 rows at a time.

What lies between two products never leaves the second-level cache. Matrices are packed for each call, which takes a
twentieth of the time that they then save and keeps no second copy of the weights.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from .attention import bytes_of, in_bf16, power_of_two
from .instructions import FAST, I64, LANES, VECTOR, declare, jit, load, multiply_add, repeat, same, store, to_bf16
from .tiles import (
    ROW_BYTES,
    ROWS,
    clear_tile,
    give_tiles_back,
    load_tile,
    multiply_tiles,
    store_tile,
    take_tiles,
)

SOME = 2 * ROWS  # rows of one task, and outputs that are computed at once
MULTIPLE = 32  # of which inputs and outputs must be one
HASTINGS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


@intrinsic
def _multiply(typing_context, x, w, block, y):
    """y (SOME, SOME) = x (SOME, K) by the outputs of two packed blocks."""

    def generate(context, b, signature, arguments):
        x, x_stride, _ = bytes_of(context, b, signature.args[0], arguments[0])
        w, w_stride, shape = bytes_of(context, b, signature.args[1], arguments[1])
        y, y_stride, _ = bytes_of(context, b, signature.args[3], arguments[3])
        columns = [b.gep(w, [b.mul(b.add(arguments[2], I64(part)), w_stride)]) for part in range(2)]
        rows = [b.gep(x, [b.mul(x_stride, I64(ROWS * row))]) for row in range(2)]
        for tile in range(4):
            clear_tile(b, tile)

        def add_inputs(pairs, _):
            for row in range(2):
                load_tile(b, 4 + row, b.gep(rows[row], [b.mul(pairs, I64(4))]), x_stride)
            for part in range(2):
                load_tile(b, 6 + part, b.gep(columns[part], [b.mul(pairs, I64(ROW_BYTES))]), I64(ROW_BYTES))
            for row in range(2):
                for part in range(2):
                    multiply_tiles(b, 2 * row + part, 4 + row, 6 + part)
            return []

        repeat(b, shape[1], ROWS, [], add_inputs)
        for row in range(2):
            for part in range(2):
                offset = b.add(b.mul(y_stride, I64(ROWS * row)), I64(ROW_BYTES * part))
                store_tile(b, 2 * row + part, b.gep(y, [offset]), y_stride)
        return context.get_dummy_value()

    return types.void(x, w, block, y), generate


@jit(parallel=True)
def pack(w, packed):
    """``packed`` (N / 16, K / 2, 16) int32: the pairs of bf16 of w (N, K / 2) int32."""
    for block in prange(packed.shape[0]):
        for pair in range(packed.shape[1]):
            for lane in range(ROWS):
                packed[block, pair, lane] = w[block * ROWS + lane, pair]


@jit(fastmath=FAST)
def _normalize(x, weight, bias, eps, y):
    """y (SOME, C) bf16: LayerNorm of x (SOME, C)."""
    width = x.shape[1]
    for j in range(SOME):
        total, squares = np.float32(0.0), np.float32(0.0)
        for c in range(width):
            total += x[j, c]
        mean = total / np.float32(width)
        for c in range(width):
            squares += (x[j, c] - mean) * (x[j, c] - mean)
        factor = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for c in range(width):
            y[j, c] = to_bf16((x[j, c] - mean) * factor * weight[c] + bias[c])


@intrinsic
def _activate(typing_context, x, bias, y):
    """y (SOME,) bf16 = GELU(x + bias); the error function within 2e-6 (Hastings, 1955)."""

    def generate(context, b, signature, arguments):
        x, bias, y = (bytes_of(context, b, kind, each)[0] for kind, each in zip(signature.args, arguments, strict=True))
        one = same(VECTOR, 1.0)
        for at in range(0, SOME, LANES):
            offset = [I64(4 * at)]
            number = b.fadd(load(b, b.gep(x, offset), VECTOR, 4), load(b, b.gep(bias, offset), VECTOR, 4))
            size = b.call(declare(b, f"llvm.fabs.v{LANES}f32", VECTOR, [VECTOR]), [number])
            t = b.fdiv(one, multiply_add(b, size, same(VECTOR, 0.3275911 * math.sqrt(0.5)), one))
            p = same(VECTOR, HASTINGS[0])
            for coefficient in HASTINGS[1:]:
                p = multiply_add(b, p, t, same(VECTOR, coefficient))
            power = power_of_two(b, b.fmul(b.fmul(number, number), same(VECTOR, -0.5 / math.log(2))))
            tail = b.fmul(b.fmul(b.fmul(p, t), power), same(VECTOR, 0.5))  # the normal distribution's share beyond |x|
            share = b.select(b.fcmp_ordered(">", number, same(VECTOR, 0.0)), b.fsub(one, tail), tail)
            store(b, in_bf16(b, b.fmul(number, share)), b.gep(y, [I64(2 * at)]), 2)
        return context.get_dummy_value()

    return types.void(x, bias, y), generate


# over slices, whose loops become vectors: indices that may be negative do not


@jit(fastmath=FAST)
def _add(x, part, bias, y):
    for n in range(SOME):
        y[n] = x[n] + part[n] + bias[n]


@jit(fastmath=FAST)
def _round(x, y):
    for n in range(SOME):
        y[n] = to_bf16(x[n])


@jit(parallel=True, fastmath=FAST)
def normalize_and_multiply(x, norm_weight, norm_bias, eps, w, y):
    """y (R, N) bf16 as int16 = LayerNorm(x) by w: x (R, C) fp32, R at least SOME; w as ``pack`` makes it."""
    rows, width = x.shape
    for task in prange((rows + SOME - 1) // SOME):
        first = min(task * SOME, rows - SOME)  # the last ones overlap those before
        normed, part = np.empty((SOME, width), np.int16), np.empty((SOME, SOME), np.float32)
        _normalize(x[first : first + SOME], norm_weight, norm_bias, eps, normed)
        take_tiles()
        for block in range(0, w.shape[0], 2):
            _multiply(normed, w, block, part)
            for j in range(SOME):
                _round(part[j], y[first + j, ROWS * block : ROWS * block + SOME])
        give_tiles_back()


@jit(parallel=True, fastmath=FAST)
def finish(attended, x, out, norm, up, down, y):
    """The rest of a block behind its attention: y = z + down(GELU(up(LayerNorm(z)))), where z = x + out(attended).

    Args:
        attended: (R, inner) bf16 as int16, R at least SOME.
        x, y: (R, C) fp32, two arrays.
        out, up, down: packed weights and fp32 biases.
        norm: weight, bias and epsilon.
    """
    rows, width = x.shape
    hidden = up[0].shape[0] * ROWS
    for task in prange((rows + SOME - 1) // SOME):
        first = min(task * SOME, rows - SOME)
        z, part = np.empty((SOME, width), np.float32), np.empty((SOME, SOME), np.float32)
        normed, inner = np.empty((SOME, width), np.int16), np.empty((SOME, hidden), np.int16)
        take_tiles()
        for block in range(0, out[0].shape[0], 2):
            _multiply(attended[first : first + SOME], out[0], block, part)
            columns = slice(ROWS * block, ROWS * block + SOME)
            for j in range(SOME):
                _add(x[first + j, columns], part[j], out[1][columns], z[j, columns])
        _normalize(z, norm[0], norm[1], norm[2], normed)
        for block in range(0, up[0].shape[0], 2):
            _multiply(normed, up[0], block, part)
            columns = slice(ROWS * block, ROWS * block + SOME)
            for j in range(SOME):
                _activate(part[j], up[1][columns], inner[j, columns])
        for block in range(0, down[0].shape[0], 2):
            _multiply(inner, down[0], block, part)
            columns = slice(ROWS * block, ROWS * block + SOME)
            for j in range(SOME):
                _add(z[j, columns], part[j], down[1][columns], y[first + j, columns])
        give_tiles_back()
