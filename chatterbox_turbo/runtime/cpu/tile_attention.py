"""``attention`` on a processor with AMX: the same steps over the same packed keys and values, products by tiles.

There AVX-512's products of pairs are a sixth as fast as the tiles'.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from . import attention
from .attention import WIDTH, bytes_of, pack, weigh
from .instructions import FAST, I64, jit, repeat, to_bf16
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

GROUP, LANES, HIDDEN = attention.GROUP, attention.LANES, attention.HIDDEN
QUERIES = 2 * ROWS  # that meet all keys at once
SOME = 128  # queries of one task
PAIRED = 2 * ROWS  # bf16 numbers in a row of a tile


@intrinsic
def _score(typing_context, q, first, keys, scores):
    """scores[j, i] = q[first + j] . key i, for QUERIES rows j and all keys."""

    def generate(context, b, signature, arguments):
        q, q_stride, _ = bytes_of(context, b, signature.args[0], arguments[0])
        keys, keys_stride, shape = bytes_of(context, b, signature.args[2], arguments[2])
        scores, stride, _ = bytes_of(context, b, signature.args[3], arguments[3])
        for row in range(2):
            queries = b.gep(q, [b.mul(b.add(arguments[1], I64(ROWS * row)), q_stride)])
            for part in range(2):
                load_tile(b, 2 * row + part, b.gep(queries, [I64(ROW_BYTES * part)]), q_stride)

        def meet(block, values):
            at = b.gep(keys, [b.mul(block, keys_stride)])
            for part in range(2):
                load_tile(b, 6 + part, b.gep(at, [I64(ROWS * ROW_BYTES * part)]), I64(ROW_BYTES))
            for row in range(2):
                clear_tile(b, 4 + row)
            for part in range(2):
                for row in range(2):
                    multiply_tiles(b, 4 + row, 2 * row + part, 6 + part)
            for row in range(2):
                offset = b.add(b.mul(stride, I64(ROWS * row)), b.mul(block, I64(ROW_BYTES)))
                store_tile(b, 4 + row, b.gep(scores, [offset]), stride)
            return []

        repeat(b, shape[0], 1, [], meet)
        return context.get_dummy_value()

    return types.void(q, first, keys, scores), generate


@intrinsic
def _mix(typing_context, weights, values, result):
    """result[j] = sum over frames of weights[j] values, for QUERIES rows j."""

    def generate(context, b, signature, arguments):
        weights, stride, _ = bytes_of(context, b, signature.args[0], arguments[0])
        values, _, shape = bytes_of(context, b, signature.args[1], arguments[1])
        result, result_stride, _ = bytes_of(context, b, signature.args[2], arguments[2])
        line = I64(4 * WIDTH)  # bytes of a pair of frames
        for half in range(2):
            for tile in range(4):
                clear_tile(b, tile)

            def add_frames(pairs, _, half=half):
                for row in range(2):
                    offset = b.add(b.mul(stride, I64(ROWS * row)), b.mul(pairs, I64(4)))
                    load_tile(b, 4 + row, b.gep(weights, [offset]), stride)
                at = b.gep(values, [b.mul(pairs, line)])
                for part in range(2):
                    load_tile(b, 6 + part, b.gep(at, [I64(ROW_BYTES * (2 * half + part))]), line)
                for row in range(2):
                    for part in range(2):
                        multiply_tiles(b, 2 * row + part, 4 + row, 6 + part)
                return []

            repeat(b, shape[0], ROWS, [], add_frames)
            for row in range(2):
                for part in range(2):
                    offset = b.add(b.mul(result_stride, I64(ROWS * row)), I64(ROW_BYTES * (2 * half + part)))
                    store_tile(b, 2 * row + part, b.gep(result, [offset]), result_stride)
        return context.get_dummy_value()

    return types.void(weights, values, result), generate


@jit(parallel=True, fastmath=FAST)
def attend(q, k, v, seen, keys, values, result):
    """``attention.attend``, with T at least QUERIES."""
    rows, heads, frames, width = q.shape
    for head in prange(rows * heads):
        pack(k[head // heads, head % heads], v[head // heads, head % heads], keys[head], values[head])
    scale = np.float32(1.4426950408889634 / math.sqrt(width))  # 1 / log(2): powers of two take the place of e's
    shares = (frames + SOME - 1) // SOME
    for task in prange(rows * heads * shares):
        row, head, share = task // shares // heads, task // shares % heads, task % shares
        queries, packed = q[row, head], task // shares
        scores = np.empty((QUERIES, seen.shape[1]), np.float32)
        weights = np.empty((QUERIES, seen.shape[1]), np.int16)
        mixed = np.empty((QUERIES, width), np.float32)
        sums = np.empty(QUERIES, np.float32)
        take_tiles()
        for at in range(share * SOME, min((share + 1) * SOME, frames), QUERIES):
            first = min(at, frames - QUERIES)  # the last ones overlap those before
            _score(queries, first, keys[packed], scores)
            for j in range(QUERIES):
                sums[j] = weigh(scores[j], seen[row], scale, weights[j])
            _mix(weights, values[packed], mixed)
            for j in range(QUERIES):
                for d in range(width):
                    result[row, first + j, head, d] = to_bf16(mixed[j, d] / sums[j])
        give_tiles_back()
