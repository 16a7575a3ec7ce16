"""Products of few rows with matrices of small integers, compiled by numba: what ``products`` is for fp32 and bf16.

A matrix is a tuple of codes, scales and zeros as ``device.quantized`` describes int8 and int4, with scales and zeros in
bf16 handed in as int16; zeros are empty for int8. Where the processor multiplies small integers (AVX-512 VNNI),
activations become integers as well, with a scale of their own for each row and group of inputs: int16 for int8 weights,
int8 for int4 weights, either of them several times finer than the weights. Elsewhere codes become fp32 in registers.

Each output is the same sum in the same order for any number of rows, so that a row's result does not depend on what
else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .instructions import (
    EXACT,
    F32,
    I32,
    I64,
    LANES,
    PAIRS,
    VECTOR,
    declare,
    fold,
    jit,
    load,
    multiply_add,
    multiply_bytes,
    multiply_words,
    prefetch,
    repeat,
    same,
    spread,
    store,
    to_integer,
)

SCHEMES = ("int8", "int4")
INPUTS = 128  # of which the inner size is a multiple: a group of int8, two of int4
LARGEST = 16384  # inner size that there is room for
AHEAD = 4096  # bytes of codes that a prefetch is ahead of its use
SCALES_AHEAD = 1024  # the same of scales and of zeros, which are read more slowly
ROWS = 4  # rows that one pass over the weights serves
BLOCK = 8  # outputs whose codes stay in the nearest cache while more rows than that pass by


def why_not(scheme: str, inner: int) -> str:
    """Why matrices of a scheme with so many inputs cannot be multiplied by, or an empty string."""
    if scheme not in SCHEMES:
        return f"there are kernels for {' and '.join(SCHEMES)}, not for {scheme}"
    if inner % INPUTS or inner > LARGEST:
        return f"{inner} inputs are no multiple of {INPUTS} up to {LARGEST}, as {scheme} needs"
    return ""


def _make_products(rows: int) -> Callable:
    """``products(w, x, y, first, last, r, ahead)``: y[r + j, n] = sum over k of w[n, k] * x[r + j, k] for j < rows.

    For n from ``first`` up to ``last``, while the codes ``ahead`` bytes behind are asked for; 0: none are.
    """

    @intrinsic
    def products(typing_context, w, x, y, first, last, r, ahead):
        def generate(context, b, signature, arguments):
            w_type, x_type, y_type = signature.args[:3]
            make = context.make_array
            codes, scales, zeros = (
                make(t)(context, b, value)
                for t, value in zip(w_type, cgutils.unpack_tuple(b, arguments[0]), strict=True)
            )
            numbers, factors, sums = (
                make(t)(context, b, value)
                for t, value in zip(x_type, cgutils.unpack_tuple(b, arguments[1]), strict=True)
            )
            y = make(y_type)(context, b, arguments[2])
            first, last, r, ahead = arguments[3:]
            four_bits = w_type[0].dtype == types.uint8
            in_fp32 = x_type[0].dtype == types.float32
            block = _BLOCKS[four_bits, in_fp32]
            row_bytes = cgutils.unpack_tuple(b, codes.shape)[1]
            groups = cgutils.unpack_tuple(b, scales.shape)[1]
            inner = b.mul(row_bytes, I64(2)) if four_bits else row_bytes
            number_rows, factor_rows, sum_rows, y_rows = (
                _rows_of(b, array, size, r, rows)
                for array, size in ((numbers, x_type[0].dtype.bitwidth // 8), (factors, 4), (sums, 4), (y, 4))
            )
            room = LARGEST // (INPUTS // 2)  # of whole vectors
            weights = [cgutils.alloca_once(b, ir.ArrayType(F32, room)) for _ in range(rows)]
            weights = [b.bitcast(each, F32.as_pointer()) for each in weights]
            with cgutils.for_range_slice(b, first, last, I64(1)) as (n, _):
                at = b.mul(n, groups)
                scale_row, zero_row = (
                    b.gep(array.data, [at]) if four_bits or array is scales else None for array in (scales, zeros)
                )
                shifts = _combine_scales(
                    b, scale_row, zero_row, groups, factor_rows, sum_rows, weights, 1 if in_fp32 else LANES
                )
                code_row = b.gep(codes.data, [b.mul(n, row_bytes)])
                totals = _dot(b, block, code_row, number_rows, weights, inner, ahead, 1 + four_bits)
                for j in range(rows):
                    total = totals[j] if in_fp32 else b.fadd(totals[j], shifts[j])
                    total = fold(b, total, b.fadd)
                    b.store(b.fadd(total, shifts[j]) if in_fp32 else total, b.gep(y_rows[j], [n]))
            return context.get_dummy_value()

        return types.void(w, x, y, first, last, r, ahead), generate

    return products


def _rows_of(b, array, size, r, rows):
    """Addresses of ``rows`` rows from ``r`` on."""
    stride = b.udiv(cgutils.unpack_tuple(b, array.strides)[0], I64(size))
    return [b.gep(array.data, [b.mul(b.add(r, I64(j)), stride)]) for j in range(rows)]


def _combine_scales(b, scale_row, zero_row, groups, factor_rows, sum_rows, weights, lanes):
    """Write scale times factor of each group and row to ``weights``; what zeros take off each row.

    Memory, since an instruction that multiplies can take its number from there for all lanes, at no cost.
    """
    rows = range(len(factor_rows))
    kind = VECTOR if lanes > 1 else F32
    totals = [cgutils.alloca_once_value(b, ir.Constant(kind, [0.0] * lanes if lanes > 1 else 0.0)) for _ in rows]
    with cgutils.for_range_slice(b, I64(0), groups, I64(lanes)) as (g, _):
        left = b.sub(groups, g)
        scale = _load_bf16(b, b.gep(scale_row, [g]), lanes, left)
        if zero_row is not None:
            shift = b.fmul(scale, _load_bf16(b, b.gep(zero_row, [g]), lanes, left))
        for j in rows:
            product = b.fmul(scale, _load_some(b, b.gep(factor_rows[j], [g]), F32, lanes, left))
            store(b, product, b.gep(weights[j], [g]), 4)
            if zero_row is not None:
                sums = _load_some(b, b.gep(sum_rows[j], [g]), F32, lanes, left)
                b.store(multiply_add(b, shift, b.fneg(sums), b.load(totals[j])), totals[j])
    for row in (scale_row, zero_row):
        if row is not None:
            prefetch(b, row, I64(SCALES_AHEAD))
    return [b.load(total) for total in totals]


def _load_some(b, pointer, kind, lanes, left):
    """Numbers, as many as are ``left`` of the lanes, and zeros: one instruction where there is AVX-512."""
    if lanes == 1:
        return b.load(pointer)
    vector, bits = ir.VectorType(kind, lanes), ir.VectorType(ir.IntType(1), lanes)
    within = b.trunc(b.select(b.icmp_signed("<", left, I64(lanes)), left, I64(lanes)), I32)
    mask = b.icmp_signed("<", ir.Constant(PAIRS, list(range(lanes))), spread(b, within, PAIRS))
    pointer = b.bitcast(pointer, vector.as_pointer())
    size = "f32" if kind == F32 else f"i{kind.width}"
    function = declare(
        b, f"llvm.masked.load.v{lanes}{size}.p0v{lanes}{size}", vector, [pointer.type, I32, bits, vector]
    )
    zero = 0.0 if kind == F32 else 0
    return b.call(
        function, [pointer, I32(kind.width // 8 if kind != F32 else 4), mask, ir.Constant(vector, [zero] * lanes)]
    )


def _load_bf16(b, pointer, lanes, left):
    """bf16 numbers as fp32, of which they are the upper halves."""
    loaded = _load_some(b, pointer, ir.IntType(16), lanes, left)
    if lanes == 1:
        return b.bitcast(b.shl(b.zext(loaded, I32), I32(16)), F32)
    return b.bitcast(b.shl(b.zext(loaded, PAIRS), same(PAIRS, 16)), VECTOR)


def _dot(b, block, code_row, number_rows, weights, inner, ahead, groups):
    """Emit the loop over ``inner``, ``INPUTS`` at a time; the sum of each row, as a vector."""
    rows = range(len(number_rows))
    codes = INPUTS // groups  # bytes of a block of inputs: half of them where there are two groups in it

    def add_block(k, before):
        totals, at = list(before), b.udiv(k, I64(groups))
        for line in range(codes // 64):
            prefetch(b, code_row, b.add(at, b.add(ahead, I64(64 * line))))
        group = b.udiv(k, I64(codes))
        parts = block(b, b.gep(code_row, [at]), [b.gep(row, [k]) for row in number_rows])
        for j in rows:
            for i in range(groups):
                weight = spread(b, b.load(b.gep(weights[j], [b.add(group, I64(i))])), VECTOR)
                totals[groups * j + i] = multiply_add(b, parts[j][i], weight, totals[groups * j + i])
        return totals

    totals = repeat(b, inner, INPUTS, [same(VECTOR, 0.0)] * (groups * len(rows)), add_block)
    return [b.fadd(totals[2 * j], totals[2 * j + 1]) if groups == 2 else totals[j] for j in rows]


BYTES, NIBBLES = ir.VectorType(ir.IntType(8), LANES), same(PAIRS, 0x0F0F0F0F)


def _int8_by_int16(b, codes, rows):
    """Sums of the products of 128 codes with each row, by group: here and in those below, 16 lanes in fp32."""
    words, byte = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(ir.IntType(8), 2 * LANES)
    places = [I64(at) for at in range(0, INPUTS, 2 * LANES)]
    w = [b.bitcast(b.sext(load(b, b.gep(codes, [at]), byte, 1), words), PAIRS) for at in places]
    result = []
    for row in rows:
        total = same(PAIRS, 0)
        for at, weights in zip(places, w, strict=True):
            total = multiply_words(b, weights, load(b, b.gep(row, [at]), PAIRS, 2), total)
        result.append([b.sitofp(total, VECTOR)])
    return result


def _int4_by_int8(b, codes, rows):
    both = load(b, codes, PAIRS, 1)
    halves = [b.and_(both, NIBBLES), b.and_(b.lshr(both, same(PAIRS, 4)), NIBBLES)]
    result = []
    for row in rows:
        numbers = [load(b, b.gep(row, [I64(at)]), PAIRS, 1) for at in (0, INPUTS // 2)]
        totals = (multiply_bytes(b, w, x, same(PAIRS, 0)) for w, x in zip(halves, numbers, strict=True))
        result.append([b.sitofp(total, VECTOR) for total in totals])
    return result


def _int8_by_fp32(b, codes, rows):
    result = [[same(VECTOR, 0.0)] for _ in rows]
    for at in range(0, INPUTS, LANES):
        w = b.sitofp(b.sext(load(b, b.gep(codes, [I64(at)]), BYTES, 1), PAIRS), VECTOR)
        for totals, row in zip(result, rows, strict=True):
            totals[0] = multiply_add(b, w, load(b, b.gep(row, [I64(at)]), VECTOR, 4), totals[0])
    return result


def _int4_by_fp32(b, codes, rows):
    result = [[same(VECTOR, 0.0)] * 2 for _ in rows]
    for at in range(0, INPUTS // 2, LANES):
        both = b.zext(load(b, b.gep(codes, [I64(at)]), BYTES, 1), PAIRS)
        halves = b.and_(both, same(PAIRS, 15)), b.lshr(both, same(PAIRS, 4))
        for i, half in enumerate(halves):
            w, place = b.sitofp(half, VECTOR), I64(at + i * INPUTS // 2)
            for totals, row in zip(result, rows, strict=True):
                totals[i] = multiply_add(b, w, load(b, b.gep(row, [place]), VECTOR, 4), totals[i])
    return result


# by whether weights have four bits, and whether activations are in fp32
_BLOCKS = {
    (False, False): _int8_by_int16,
    (True, False): _int4_by_int8,
    (False, True): _int8_by_fp32,
    (True, True): _int4_by_fp32,
}
_one, _two, _three, _four = (_make_products(rows) for rows in (1, 2, 3, 4))


@jit()
def quantized_products(w, x, y, first, last):
    """Outputs ``first`` up to ``last`` of every row: w (codes, scales, zeros), x as ``quantized_operand`` makes it."""
    rows = y.shape[0]
    size = BLOCK if rows > ROWS else last - first
    for n in range(first, last, max(size, 1)):
        end = min(n + size, last)
        ahead = AHEAD if rows <= ROWS else max(AHEAD, BLOCK * w[0].shape[1])
        for r in range(0, rows, ROWS):
            left = rows - r
            if left == 1:
                _one(w, x, y, n, end, r, ahead)
            elif left == 2:
                _two(w, x, y, n, end, r, ahead)
            elif left == 3:
                _three(w, x, y, n, end, r, ahead)
            else:
                _four(w, x, y, n, end, r, ahead)


@jit(fastmath=EXACT)
def _round(x, group, largest, numbers, factors, sums):
    """x (R, K) as integers from -largest to largest with a factor for each group of a row, and the sum of each."""
    for r in range(x.shape[0]):
        for g in range(x.shape[1] // group):
            values, rounded = x[r, g * group : (g + 1) * group], numbers[r, g * group : (g + 1) * group]
            highest = np.float32(0.0)
            for k in range(group):
                highest = max(highest, abs(values[k]))
            inverse = largest / highest if highest > np.float32(1e-30) else np.float32(0.0)
            total = np.int32(0)
            for k in range(group):
                number = to_integer(values[k] * inverse)
                total += number
                rounded[k] = number
            factors[r, g] = highest / largest
            sums[r, g] = np.float32(total) * factors[r, g]


@jit(fastmath=EXACT)
def _sum(x, group, factors, sums):
    """Sums of the groups of x (R, K), which stays as it is: factors of 1."""
    for r in range(x.shape[0]):
        for g in range(x.shape[1] // group):
            total = np.float32(0.0)
            for k in range(g * group, (g + 1) * group):
                total += x[r, k]
            factors[r, g], sums[r, g] = np.float32(1.0), total


def quantized_operand(x, w, scratch):
    """What a product with ``w`` reads: numbers (R, K), their factors and sums (R, K / group) of x (R, K) fp32.

    ``scratch``: for numbers int16 and int8 (R, K at least), or empty fp32 arrays where activations stay as they are;
    for factors and sums fp32 (R, K / 64 at least).
    """


@overload(quantized_operand)
def _choose_operand(x, w, scratch):
    if scratch[0].dtype == types.float32:
        group = INPUTS if w[0].dtype == types.int8 else INPUTS // 2

        def plain(x, w, scratch):
            _sum(x, group, scratch[2], scratch[3])
            return x, scratch[2], scratch[3]

        return plain
    if w[0].dtype == types.int8:

        def in_words(x, w, scratch):
            _round(x, INPUTS, np.float32(32767.0), scratch[0], scratch[2], scratch[3])
            return scratch[0], scratch[2], scratch[3]

        return in_words

    def in_bytes(x, w, scratch):
        _round(x, INPUTS // 2, np.float32(127.0), scratch[1], scratch[2], scratch[3])
        return scratch[1], scratch[2], scratch[3]

    return in_bytes
