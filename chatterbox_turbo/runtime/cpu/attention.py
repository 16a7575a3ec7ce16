"""Full attention in bf16 on a CPU with AVX-512 BF16, compiled by numba: scores never leave the nearest caches.

Six queries at a time meet all keys; their scores become weights, and the weights a sum of values, before the next six
come (the idea of FlashAttention, 2022, whose running maximum is not needed where a row of scores fits a cache).
Products add pairs of bf16 to fp32, so that keys lie in pairs of components and values in pairs of frames.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from .instructions import (
    BYTE,
    FAST,
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
    multiply_pairs,
    repeat,
    same,
    spread,
    store,
    to_bf16,
)

WIDTH = 64  # components of a head
QUERIES, VECTORS = 6, WIDTH // LANES  # 24 sums fill the registers beside what they are made of
GROUP = LANES * VECTORS  # keys that are met at once
SOME = 120  # queries of one task
HIDDEN = -1e30  # what is added to the score of a key that is not seen

_HALF = ir.VectorType(ir.IntType(16), LANES)


def bytes_of(context, b, kind, array):
    """Address of an array's first byte, the bytes from row to row, and its shape."""
    array = context.make_array(kind)(context, b, array)
    return b.bitcast(array.data, BYTE), cgutils.unpack_tuple(b, array.strides)[0], cgutils.unpack_tuple(b, array.shape)


def _emit_products(b, rows, columns, stride, count, results, results_stride):
    """results[j] (WIDTH fp32) = sum over ``count`` pairs: one of row j with a line of WIDTH pairs.

    ``columns``: addresses of the VECTORS parts of the first line, ``stride`` bytes from one line to the next.
    """

    def add_pair(at, sums):
        lines = [load(b, b.gep(column, [b.mul(at, I64(stride))]), PAIRS, 4) for column in columns]
        pairs = (spread(b, load(b, b.gep(row, [b.mul(at, I64(4))]), I32, 2), PAIRS) for row in rows)
        return [
            multiply_pairs(b, line, pair, sums[VECTORS * j + n])
            for j, pair in enumerate(pairs)
            for n, line in enumerate(lines)
        ]

    sums = repeat(b, count, 1, [same(VECTOR, 0.0)] * (QUERIES * VECTORS), add_pair)
    for number, total in enumerate(sums):
        j, n = divmod(number, VECTORS)
        offset = b.add(b.mul(results_stride, I64(j)), I64(4 * LANES * n))
        store(b, total, b.gep(results, [offset]), 4)


@intrinsic
def _score(typing_context, q, first, keys, group, scores):
    """scores[j, GROUP group + i] = q[first + j] . key i of the group, for QUERIES rows j."""

    def generate(context, b, signature, arguments):
        first, group = arguments[1], arguments[3]
        q, q_stride, _ = bytes_of(context, b, signature.args[0], arguments[0])
        keys, keys_stride, _ = bytes_of(context, b, signature.args[2], arguments[2])
        scores, scores_stride, _ = bytes_of(context, b, signature.args[4], arguments[4])
        rows = [b.gep(q, [b.mul(b.add(first, I64(j)), q_stride)]) for j in range(QUERIES)]
        blocks = (b.add(b.mul(group, I64(VECTORS)), I64(n)) for n in range(VECTORS))
        columns = [b.gep(keys, [b.mul(block, keys_stride)]) for block in blocks]
        scores = b.gep(scores, [b.mul(group, I64(4 * GROUP))])
        _emit_products(b, rows, columns, 4 * LANES, I64(WIDTH // 2), scores, scores_stride)
        return context.get_dummy_value()

    return types.void(q, first, keys, group, scores), generate


@intrinsic
def _mix(typing_context, weights, values, result):
    """result[j] = sum over frames of weights[j] values, for QUERIES rows j."""

    def generate(context, b, signature, arguments):
        weights, stride, _ = bytes_of(context, b, signature.args[0], arguments[0])
        values, _, shape = bytes_of(context, b, signature.args[1], arguments[1])
        result, result_stride, _ = bytes_of(context, b, signature.args[2], arguments[2])
        rows = [b.gep(weights, [b.mul(stride, I64(j))]) for j in range(QUERIES)]
        columns = [b.gep(values, [I64(4 * LANES * n)]) for n in range(VECTORS)]
        _emit_products(b, rows, columns, 4 * WIDTH, shape[0], result, result_stride)
        return context.get_dummy_value()

    return types.void(weights, values, result), generate


def in_bf16(b, x):
    """The bits of a vector of numbers in bf16, ties to even."""
    bits = b.bitcast(x, PAIRS)
    odd = b.and_(b.lshr(bits, same(PAIRS, 16)), same(PAIRS, 1))
    return b.trunc(b.lshr(b.add(b.add(bits, same(PAIRS, 0x7FFF)), odd), same(PAIRS, 16)), _HALF)


def power_of_two(b, x):
    """2 ** x of a vector of numbers up to 0: the error of the Taylor polynomial is 2e-6, of bf16 2e-3."""
    x = b.select(b.fcmp_ordered(">", x, same(VECTOR, -126.0)), x, same(VECTOR, -126.0))
    whole = b.call(declare(b, f"llvm.rint.v{LANES}f32", VECTOR, [VECTOR]), [x])
    rest = b.fsub(x, whole)
    power = same(VECTOR, _TAYLOR[-1])
    for coefficient in reversed(_TAYLOR[:-1]):
        power = multiply_add(b, power, rest, same(VECTOR, coefficient))
    exponent = b.shl(b.fptosi(whole, PAIRS), same(PAIRS, 23))
    return b.bitcast(b.add(b.bitcast(power, PAIRS), exponent), VECTOR)


_TAYLOR = [float(np.float32(math.log(2) ** n / math.factorial(n))) for n in range(6)]


@intrinsic
def weigh(typing_context, scores, seen, scale, weights):
    """weights = 2 ** (scale (scores - the largest)) in bf16, of keys that are seen; their sum in fp32."""

    def generate(context, b, signature, arguments):
        scale = arguments[2]
        scores, _, shape = bytes_of(context, b, signature.args[0], arguments[0])
        seen, _, _ = bytes_of(context, b, signature.args[1], arguments[1])
        weights, _, _ = bytes_of(context, b, signature.args[3], arguments[3])

        def larger(x, y):
            return b.select(b.fcmp_ordered(">", x, y), x, y)

        def score(at):
            offset = [b.mul(at, I64(4))]
            return b.fadd(load(b, b.gep(scores, offset), VECTOR, 4), load(b, b.gep(seen, offset), VECTOR, 4))

        first = same(VECTOR, 2 * HIDDEN)
        (largest,) = repeat(b, shape[0], LANES, [first], lambda at, values: [larger(score(at), values[0])])
        factor = spread(b, scale, VECTOR)
        shift = spread(b, b.fneg(b.fmul(fold(b, largest, larger), scale)), VECTOR)

        def weigh(at, values):
            power = power_of_two(b, multiply_add(b, score(at), factor, shift))
            store(b, in_bf16(b, power), b.gep(weights, [b.mul(at, I64(2))]), 2)
            return [b.fadd(values[0], power)]

        (sums,) = repeat(b, shape[0], LANES, [same(VECTOR, 0.0)], weigh)
        return fold(b, sums, b.fadd)

    return types.float32(scores, seen, scale, weights), generate


@jit()
def pack(k, v, keys, values):
    """Keys (T, WIDTH) as ``pack_keys`` does, values to (pairs of frames, WIDTH, 2)."""
    frames = k.shape[0]
    pack_keys(k, keys)
    for pair in range(values.shape[0]):
        for d in range(k.shape[1]):
            values[pair, d, 0] = v[2 * pair, d] if 2 * pair < frames else 0
            values[pair, d, 1] = v[2 * pair + 1, d] if 2 * pair + 1 < frames else 0


@jit()
def pack_keys(k, keys):
    """Keys (T, WIDTH) to (blocks, pairs of components, LANES keys, 2), zeros behind them."""
    frames, width = k.shape
    for block in range(keys.shape[0]):
        for lane in range(LANES):
            t = block * LANES + lane
            for pair in range(width // 2):
                keys[block, pair, lane, 0] = k[t, 2 * pair] if t < frames else 0
                keys[block, pair, lane, 1] = k[t, 2 * pair + 1] if t < frames else 0


@jit()
def attend(q, k, v, seen, keys, values, result):
    """Attention of every query over the keys that are seen; bf16 as int16, T at least QUERIES.

    Args:
        q, k, v: (R, H, T, WIDTH), contiguous in the last dimension.
        seen: (R, T rounded up to GROUP) fp32, 0 for a key that is seen and HIDDEN for one that is not.
        keys: (R H, blocks of LANES, WIDTH / 2, LANES, 2), receives the packed keys.
        values: (R H, T rounded up to GROUP / 2, WIDTH, 2), receives the packed values.
        result: (R, T, H, WIDTH).
    """
    attend_by_distance(q, k, v, seen, keys, values, result, q, q[0, :, :0], keys[:0])


@jit(parallel=True, fastmath=FAST)
def attend_by_distance(q, k, v, seen, keys, values, result, asking, distances, places):
    """``attend`` with what the distance from query to key adds to a score, before all is scaled.

    Args:
        asking: (R, H, T, WIDTH), queries that meet distances.
        distances: (H, 2 T - 1, WIDTH), keys of the distances T - 1 to 1 - T; none of them: nothing is added.
        places: (H, 2 T - 1 rounded up to GROUP / LANES, WIDTH / 2, LANES, 2), receives the packed distances.
    """
    rows, heads, frames, width = q.shape
    for head in prange(rows * heads):
        pack(k[head // heads, head % heads], v[head // heads, head % heads], keys[head], values[head])
    for head in prange(len(places)):
        pack_keys(distances[head], places[head])
    scale = np.float32(1.4426950408889634 / math.sqrt(width))  # 1 / log(2): powers of two take the place of e's
    shares = (frames + SOME - 1) // SOME
    for task in prange(rows * heads * shares):
        row, head, share = task // shares // heads, task // shares % heads, task % shares
        queries, packed = q[row, head], task // shares
        scores = np.empty((QUERIES, seen.shape[1]), np.float32)
        weights = np.empty((QUERIES, seen.shape[1]), np.int16)
        mixed = np.empty((QUERIES, width), np.float32)
        sums = np.empty(QUERIES, np.float32)
        # the rows are read as far as those of the scores
        added = np.zeros((QUERIES, 2 * seen.shape[1] if len(places) else 0), np.float32)
        for at in range(share * SOME, min((share + 1) * SOME, frames), QUERIES):
            first = min(at, frames - QUERIES)  # the last ones overlap those before
            for group in range(seen.shape[1] // GROUP):
                _score(queries, first, keys[packed], group, scores)
            if len(places):
                last = frames - 1 - first  # place of the first query's distance to key 0; each one's is 1 before
                for group in range((last - QUERIES + 1) // GROUP, (last + frames - 1) // GROUP + 1):
                    _score(asking[row, head], first, places[head], group, added)
                for j in range(QUERIES):
                    for t in range(seen.shape[1]):
                        scores[j, t] += added[j, last - j + t]
            for j in range(QUERIES):
                sums[j] = weigh(scores[j], seen[row], scale, weights[j])
            _mix(weights, values[packed], mixed)
            for j in range(QUERIES):
                for d in range(width):
                    result[row, first + j, head, d] = to_bf16(mixed[j, d] / sums[j])
