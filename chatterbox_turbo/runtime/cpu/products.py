"""Products of few rows on a CPU at the speed of the memory, compiled by numba.

BLAS libraries read the weights once per row when there are two rows (MKL) and pack a copy first when there are more.
Here each weight is loaded once, used for up to four rows while it is in a register, and what will be needed next is
asked for ahead of time. Weights are fp32, or bf16 handed in as int16; activations are fp32, or bf16 as well where the
processor multiplies pairs of them (AVX-512 BF16), which is twice the arithmetic an instruction.

Each output is the sum of the same 32 partial sums in the same order for any number of rows, so that a row's result
does not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .instructions import (
    EXACT,
    I64,
    LANES,
    PAIRS,
    VECTOR,
    exp,
    fold,
    jit,
    load,
    multiply_add,
    multiply_pairs,
    prefetch,
    repeat,
    round_to_bf16,
    same,
)
from .quantized_products import quantized_operand, quantized_products

UNROLL = 2  # registers of one sum: a single one would wait for its own additions
ROUNDS = 4  # between two jumps, where one stream of weights is read: 5 % faster than 1, 10 % than 16
GRANULE = LANES * UNROLL * ROUNDS  # the inner size of a product is a multiple of it, and of twice as much in pairs
BLOCK = 8  # outputs whose weights stay in the nearest cache while all rows pass by
AHEAD = 4096  # bytes that a prefetch is ahead of its use in a contiguous read: a row of 1024 in fp32


def _make_products(outputs: int, rows: int, shared: bool = False) -> Callable:
    """``products(w, x, y, first, last, r, part, parts)``: y[r + j, n] = sum over k of w[n, k] * x[r + j, k], j < rows.

    For n from ``first`` up to ``last``, whose distance is a multiple of ``outputs``. Where weights are ``shared`` by
    several such calls for more rows, each asks for its ``part`` of ``parts`` of the weights that follow.
    """

    @intrinsic
    def products(typing_context, w, x, y, first, last, r, part, parts):
        def generate(context, b, signature, arguments):
            w, x, y = (
                context.make_array(t)(context, b, a) for t, a in zip(signature.args[:3], arguments, strict=False)
            )
            first, last, r, part, parts = arguments[3:]
            dtype, rounded = signature.args[0].dtype, signature.args[1].dtype == types.int16
            inner = cgutils.unpack_tuple(b, w.shape)[1]
            x_stride, y_stride = (
                b.udiv(cgutils.unpack_tuple(b, a.strides)[0], I64(size))
                for a, size in ((x, 2 if rounded else 4), (y, 4))
            )
            x_rows = [b.gep(x.data, [b.mul(b.add(r, I64(j)), x_stride)]) for j in range(rows)]
            y_rows = [b.gep(y.data, [b.mul(b.add(r, I64(j)), y_stride)]) for j in range(rows)]
            # several outputs at once are several streams: each is followed by the same one of the next block
            row = b.mul(inner, I64(dtype.bitwidth // 8))
            ahead = I64(AHEAD) if outputs == 1 else b.mul(row, I64(BLOCK if shared else outputs))
            ahead = b.add(ahead, b.mul(part, b.udiv(row, parts)))
            with cgutils.for_range_slice(b, first, last, I64(outputs)) as (n, _):
                w_rows = [b.gep(w.data, [b.mul(b.add(n, I64(i)), inner)]) for i in range(outputs)]
                sums = _dot(b, w_rows, x_rows, inner, dtype, rounded, ahead, parts if shared else None)
                for (i, j), total in sums.items():
                    b.store(fold(b, total, b.fadd), b.gep(y_rows[j], [b.add(n, I64(i))]))
            return context.get_dummy_value()

        return types.void(w, x, y, first, last, r, part, parts), generate

    return products


def _dot(b, w_rows, x_rows, inner, dtype, rounded, ahead, parts):
    """Emit the loop over ``inner``; the sums of each pair of rows, as vectors."""
    width = LANES * (2 if rounded else 1)  # numbers of one register
    registers = UNROLL * (ROUNDS if len(w_rows) == 1 else 1)  # of each row between two jumps
    consumed = registers * width * dtype.bitwidth // 8  # bytes of each stream of weights
    kind, align, multiply = (PAIRS, 2, multiply_pairs) if rounded else (VECTOR, 4, multiply_add)
    sums = [(i, j, u) for i in range(len(w_rows)) for j in range(len(x_rows)) for u in range(UNROLL)]

    def add_products(k, values):
        asked, totals = values[0], dict(zip(sums, values[1:], strict=True))
        at = [b.add(k, I64(n * width)) for n in range(registers)]
        # Before the loads: one that is used once becomes a part of its multiplication then. The fewer instructions a
        # line of weights takes, the more lines the processor waits for at the same time.
        for row in w_rows:
            for line in range(1 if parts else consumed // 64):
                prefetch(b, row, b.add(asked, I64(64 * line)))
        activations = [[load(b, b.gep(row, [place]), kind, align) for place in at] for row in x_rows]
        for i, row in enumerate(w_rows):
            for n, place in enumerate(at):
                pointer = b.gep(row, [place])
                weights = load(b, pointer, PAIRS, 2) if rounded else _load_weights(b, pointer, dtype)
                for j in range(len(x_rows)):
                    total = i, j, n % UNROLL
                    totals[total] = multiply(b, weights, activations[j][n], totals[total])
        return [b.add(asked, b.udiv(I64(consumed), parts) if parts else I64(consumed)), *totals.values()]

    zeros = [same(VECTOR, 0.0)] * len(sums)
    totals = dict(zip(sums, repeat(b, inner, registers * width, [ahead, *zeros], add_products)[1:], strict=True))
    result = {}
    for i, j, u in sums:
        result[i, j] = b.fadd(result[i, j], totals[i, j, u]) if u else totals[i, j, u]
    return result


def _load_weights(b, pointer, dtype):
    """16 weights as fp32."""
    if dtype == types.float32:
        return load(b, pointer, VECTOR, 4)
    bits = b.zext(load(b, pointer, ir.VectorType(ir.IntType(16), LANES), 2), PAIRS)
    return b.bitcast(b.shl(bits, same(PAIRS, 16)), VECTOR)  # bf16 is the upper half of fp32


def operand(x, w, low):
    """What a product with ``w`` reads of x (R, K) fp32: x, x in bf16, or what quantized matrices are multiplied by.

    ``low``: int16 (R, K at least) for bf16 or an empty fp32 array for x as it is, and ``quantized_operand``'s scratch.
    """


@overload(operand)
def _choose_operand(x, w, low):
    if isinstance(w, types.BaseTuple):
        return lambda x, w, low: quantized_operand(x, w, low[1])
    if low[0].dtype == types.float32:
        return lambda x, w, low: x

    def rounded(x, w, low):
        some = low[0][:, : x.shape[1]]
        round_to_bf16(x, some)
        return some

    return rounded


_one_by_one, _one_by_two, _two_by_three, _two_by_four = (
    _make_products(outputs, rows) for outputs, rows in ((1, 1), (1, 2), (2, 3), (2, 4))
)
_shared = [_make_products(2, rows, shared=True) for rows in (1, 2, 3, 4)]
_shared_one, _shared_two, _shared_three, _shared_four = _shared


@jit()
def _few_rows(w, x, y, first, last):
    """One stream of weights after the other: the memory is the limit, not the registers."""
    rows = x.shape[0]
    for r in range(0, rows - 1, 2):
        _one_by_two(w, x, y, first, last, r, 0, 1)
    if rows % 2:
        _one_by_one(w, x, y, first, last, rows - 1, 0, 1)


@jit()
def _plain_products(w, x, y, first, last):
    rows = x.shape[0]
    if rows <= 2:
        _few_rows(w, x, y, first, last)
        return
    even = first + (last - first) // 2 * 2
    _few_rows(w, x, y, even, last)
    if rows == 3:
        _two_by_three(w, x, y, first, even, 0, 0, 1)
        return
    if rows == 4:
        _two_by_four(w, x, y, first, even, 0, 0, 1)
        return
    parts, rest = (rows + 3) // 4, rows % 4
    for n in range(first, even, BLOCK):
        end = min(n + BLOCK, even)
        for part in range(rows // 4):
            _shared_four(w, x, y, n, end, 4 * part, part, parts)
        r, part = rows - rest, parts - 1
        if rest == 1:
            _shared_one(w, x, y, n, end, r, part, parts)
        elif rest == 2:
            _shared_two(w, x, y, n, end, r, part, parts)
        elif rest == 3:
            _shared_three(w, x, y, n, end, r, part, parts)


def products(w, x, y, first, last):
    """Outputs ``first`` up to ``last`` of every row: w a matrix or (codes, scales, zeros), x what ``operand`` makes."""


@overload(products)
def _choose_products(w, x, y, first, last):
    chosen = quantized_products if isinstance(w, types.BaseTuple) else _plain_products
    return lambda w, x, y, first, last: chosen(w, x, y, first, last)


@jit()
def _share(count, shares, number):
    """First and last + 1 of the outputs of one thread, in whole blocks."""
    blocks = (count + BLOCK - 1) // BLOCK
    return min(blocks * number // shares * BLOCK, count), min(blocks * (number + 1) // shares * BLOCK, count)


@jit(parallel=True)
def project(w, bias, x, y, threads):
    """y (R, N) = x (R, K) @ w (N, K).T + bias; ``bias`` is empty where there is none; K a multiple of ``GRANULE``.

    Here and below, w is a matrix or (codes, scales, zeros), and x what ``operand`` makes for it.
    """
    for thread in prange(threads):
        first, last = _share(y.shape[1], threads, thread)
        products(w, x, y, first, last)
        if bias.size:
            for r in range(y.shape[0]):
                for n in range(first, last):
                    y[r, n] += bias[n]


@jit(parallel=True, fastmath=EXACT)
def project_gated(w, x, y, threads):
    """y (R, F) = SiLU(x @ gate.T) * (x @ up.T) with gate and up (F, K) one below the other in w; y is (R, 2 F)."""
    half = y.shape[1] // 2
    for thread in prange(threads):
        first, last = _share(half, threads, thread)
        products(w, x, y, first, last)
        products(w, x, y, half + first, half + last)
        for r in range(y.shape[0]):
            for n in range(first, last):
                gate = y[r, n]
                y[r, n] = gate / (np.float32(1.0) + exp(-gate)) * y[r, half + n]


@jit(parallel=True, fastmath=EXACT)
def project_gelu(w, bias, x, y, threads):
    """y (R, F) = GELU(x @ w.T + bias), by its tanh approximation."""
    for thread in prange(threads):
        first, last = _share(y.shape[1], threads, thread)
        products(w, x, y, first, last)
        for r in range(y.shape[0]):
            for n in range(first, last):
                v = y[r, n] + bias[n]
                u = np.float32(1.5957691216) * (v + np.float32(0.044715) * v * v * v)  # twice sqrt(2 / pi)
                y[r, n] = v / (np.float32(1.0) + exp(-u))  # (1 + tanh(u / 2)) / 2 is the logistic function of u
