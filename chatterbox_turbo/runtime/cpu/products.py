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
    store,
)
from .quantized_products import quantized_operand, quantized_products

UNROLL = 2  # registers of one sum: a single one would wait for its own additions
ROUNDS = 4  # between two jumps, where one stream of weights is read: 5 % faster than 1, 10 % than 16
GRANULE = LANES * UNROLL * ROUNDS  # the inner size of a product is a multiple of it, and of twice as much in pairs
SEGMENT = 2048  # bytes of a row of activations that stay in the nearest cache, where there are many rows,
BLOCK = 8  # and outputs whose weights for them do so while all rows pass by
AHEAD = 4096  # bytes that a prefetch is ahead of its use in a contiguous read: a row of 1024 in fp32


def _make_products(outputs: int, rows: int) -> Callable:
    """``products(w, x, y, first, last, r)``: y[r + j, n] = sum over k of w[n, k] * x[r + j, k], for j < rows.

    For n from ``first`` up to ``last``, whose distance is a multiple of ``outputs``.
    """

    @intrinsic
    def products(typing_context, w, x, y, first, last, r):
        def generate(context, b, signature, arguments):
            w, x, y = (
                context.make_array(t)(context, b, a) for t, a in zip(signature.args[:3], arguments, strict=False)
            )
            first, last, r = arguments[3:]
            dtype, rounded = signature.args[0].dtype, signature.args[1].dtype == types.int16
            inner = cgutils.unpack_tuple(b, w.shape)[1]
            x_rows, y_rows = _rows(b, x, r, rows, 2 if rounded else 4), _rows(b, y, r, rows, 4)
            # several outputs at once are several streams: each is followed by the same one of the next outputs
            ahead = I64(AHEAD) if outputs == 1 else b.mul(inner, I64(dtype.bitwidth // 8 * outputs))
            with cgutils.for_range_slice(b, first, last, I64(outputs)) as (n, _):
                w_rows = [b.gep(w.data, [b.mul(b.add(n, I64(i)), inner)]) for i in range(outputs)]
                _finish(b, _dot(b, w_rows, x_rows, inner, dtype, rounded, ahead), y_rows, n)
            return context.get_dummy_value()

        return types.void(w, x, y, first, last, r), generate

    return products


def _make_segment(rows: int) -> Callable:
    """``segment(w, x, y, sums, first, last, r, begin, part, parts)``: as ``products`` of two outputs, by inputs.

    Of the inputs from ``begin`` on, a ``SEGMENT`` or what is left. Their sums are added to those of ``sums`` (outputs,
    R, UNROLL, LANES), whose first output is ``first``; with the last inputs y gets what they come to. Weights are
    shared by ``parts`` such calls for different rows, and each asks for its ``part`` of the weights that follow.
    """

    @intrinsic
    def segment(typing_context, w, x, y, sums, first, last, r, begin, part, parts):
        def generate(context, b, signature, arguments):
            w, x, y, sums = (
                context.make_array(t)(context, b, a) for t, a in zip(signature.args[:4], arguments, strict=False)
            )
            first, last, r, begin, part, parts = arguments[4:]
            dtype, rounded = signature.args[0].dtype, signature.args[1].dtype == types.int16
            inner, every = cgutils.unpack_tuple(b, w.shape)[1], cgutils.unpack_tuple(b, sums.shape)[1]
            size, width = 2 if rounded else 4, I64(dtype.bitwidth // 8)
            left = b.sub(inner, begin)
            is_last = b.icmp_signed("<=", left, I64(SEGMENT // size))
            count = b.select(is_last, left, I64(SEGMENT // size))
            x_rows = [b.gep(row, [begin]) for row in _rows(b, x, r, rows, size)]
            y_rows = _rows(b, y, r, rows, 4)
            ahead = b.add(b.mul(b.mul(inner, width), I64(BLOCK)), b.mul(part, b.udiv(b.mul(count, width), parts)))
            with cgutils.for_range_slice(b, first, last, I64(2)) as (n, _):
                w_rows = [b.gep(w.data, [b.add(b.mul(b.add(n, I64(i)), inner), begin)]) for i in range(2)]
                places = {}
                for i in range(2):
                    output = b.mul(b.add(b.sub(n, first), I64(i)), every)
                    for j in range(rows):
                        row = b.mul(b.add(output, b.add(r, I64(j))), I64(UNROLL * LANES))
                        for u in range(UNROLL):
                            places[i, j, u] = b.gep(sums.data, [b.add(row, I64(u * LANES))])
                before = {key: load(b, place, VECTOR, 4) for key, place in places.items()}
                totals = _dot(b, w_rows, x_rows, count, dtype, rounded, ahead, parts, before)
                with b.if_else(is_last) as (then, otherwise):
                    with then:
                        _finish(b, totals, y_rows, n)
                    with otherwise:
                        for key, place in places.items():
                            store(b, totals[key], place, 4)
            return context.get_dummy_value()

        return types.void(w, x, y, sums, first, last, r, begin, part, parts), generate

    return segment


def _rows(b, array, first, count, size):
    """Where some rows of an array of numbers of ``size`` bytes begin."""
    stride = b.udiv(cgutils.unpack_tuple(b, array.strides)[0], I64(size))
    return [b.gep(array.data, [b.mul(b.add(first, I64(j)), stride)]) for j in range(count)]


def _finish(b, totals, y_rows, n):
    """Write what the vectors of each output and row add up to, outputs from ``n`` on."""
    sums = {}
    for (i, j, u), total in totals.items():
        sums[i, j] = b.fadd(sums[i, j], total) if u else total
    for (i, j), total in sums.items():
        b.store(fold(b, total, b.fadd), b.gep(y_rows[j], [b.add(n, I64(i))]))


def _dot(b, w_rows, x_rows, inner, dtype, rounded, ahead, parts=None, before=None):
    """Emit the loop over ``inner``; ``UNROLL`` sums of each pair of rows, as vectors, on top of those ``before``."""
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

    start = [before[one] if before else same(VECTOR, 0.0) for one in sums]
    return dict(zip(sums, repeat(b, inner, registers * width, [ahead, *start], add_products)[1:], strict=True))


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
_segment_one, _segment_two, _segment_three, _segment_four = (_make_segment(rows) for rows in (1, 2, 3, 4))


@jit()
def _few_rows(w, x, y, first, last):
    """One stream of weights after the other: the memory is the limit, not the registers."""
    rows = x.shape[0]
    for r in range(0, rows - 1, 2):
        _one_by_two(w, x, y, first, last, r)
    if rows % 2:
        _one_by_one(w, x, y, first, last, rows - 1)


@jit()
def _many_rows(w, x, y, first, last):
    """Four rows at a time, and of those as many inputs as stay in the nearest cache beside their weights."""
    rows, segment = x.shape[0], SEGMENT // x.itemsize
    parts, rest = (rows + 3) // 4, rows % 4
    sums = np.empty((BLOCK, rows, UNROLL, LANES), np.float32)
    for n in range(first, last, BLOCK):
        end = min(n + BLOCK, last)
        sums[:] = 0.0
        for begin in range(0, x.shape[1], segment):
            for part in range(rows // 4):
                _segment_four(w, x, y, sums, n, end, 4 * part, begin, part, parts)
            r, part = rows - rest, parts - 1
            if rest == 1:
                _segment_one(w, x, y, sums, n, end, r, begin, part, parts)
            elif rest == 2:
                _segment_two(w, x, y, sums, n, end, r, begin, part, parts)
            elif rest == 3:
                _segment_three(w, x, y, sums, n, end, r, begin, part, parts)


@jit()
def _plain_products(w, x, y, first, last):
    rows = x.shape[0]
    if rows <= 2:
        _few_rows(w, x, y, first, last)
        return
    even = first + (last - first) // 2 * 2
    _few_rows(w, x, y, even, last)
    if rows == 3:
        _two_by_three(w, x, y, first, even, 0)
    elif rows == 4:
        _two_by_four(w, x, y, first, even, 0)
    else:
        _many_rows(w, x, y, first, even)


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
            some = bias[first:last]
            for r in range(y.shape[0]):
                part = y[r, first:last]  # loops from 0 on become vector instructions, others do not
                for n in range(part.size):
                    part[n] += some[n]


@jit(parallel=True, fastmath=EXACT)
def project_gated(w, x, y, threads):
    """y (R, F) = SiLU(x @ gate.T) * (x @ up.T) with gate and up (F, K) one below the other in w; y is (R, 2 F)."""
    half = y.shape[1] // 2
    for thread in prange(threads):
        first, last = _share(half, threads, thread)
        products(w, x, y, first, last)
        products(w, x, y, half + first, half + last)
        for r in range(y.shape[0]):
            gates, ups = y[r, first:last], y[r, half + first : half + last]
            for n in range(gates.size):
                gates[n] = gates[n] / (np.float32(1.0) + exp(-gates[n])) * ups[n]


@jit(parallel=True, fastmath=EXACT)
def project_gelu(w, bias, x, y, threads):
    """y (R, F) = GELU(x @ w.T + bias), by its tanh approximation."""
    for thread in prange(threads):
        first, last = _share(y.shape[1], threads, thread)
        products(w, x, y, first, last)
        some = bias[first:last]
        for r in range(y.shape[0]):
            part = y[r, first:last]
            for n in range(part.size):
                v = part[n] + some[n]
                u = np.float32(1.5957691216) * (v + np.float32(0.044715) * v * v * v)  # twice sqrt(2 / pi)
                part[n] = v / (np.float32(1.0) + exp(-u))  # (1 + tanh(u / 2)) / 2 is the logistic function of u
