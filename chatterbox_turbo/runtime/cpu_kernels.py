"""Kernels of one decode step on a CPU, compiled by numba: products of few rows at the speed of the memory.

BLAS libraries read the weights once per row when there are two rows (MKL) and pack a copy first when there are more.
Here each weight is loaded once, used for up to four rows while it is in a register, and what will be needed next is
asked for ahead of time. Weights are fp32, or bf16 handed in as int16; activations are fp32, or bf16 as well where the
processor multiplies pairs of them (AVX-512 BF16), which is twice the arithmetic an instruction.

Each output is the sum of the same 32 partial sums in the same order for any number of rows, so that a row's result
does not depend on what else is in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LANES = 16  # fp32 numbers in an AVX-512 register; LLVM splits them where registers are narrower
UNROLL = 2  # registers of one sum: a single one would wait for its own additions
GRANULE = LANES * UNROLL  # the inner size of a product is a multiple of it, and of twice as much in pairs
BLOCK = 8  # outputs whose weights stay in the nearest cache while all rows pass by
AHEAD = 4096  # bytes that a prefetch is ahead of its use in a contiguous read: a row of 1024 in fp32

_f32, _i64 = ir.FloatType(), ir.IntType(64)
_byte = ir.IntType(8).as_pointer()
_vector = ir.VectorType(_f32, LANES)
_pairs = ir.VectorType(ir.IntType(32), LANES)  # of bf16


def _jit(**options) -> Callable:
    """``njit`` that keeps its code on disk, where there is a place that can be written."""

    def decorate(function):
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no writable cache folder: compiled anew in every process
            return njit(**options)(function)

    return decorate


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
                b.udiv(cgutils.unpack_tuple(b, a.strides)[0], _i64(size))
                for a, size in ((x, 2 if rounded else 4), (y, 4))
            )
            x_rows = [b.gep(x.data, [b.mul(b.add(r, _i64(j)), x_stride)]) for j in range(rows)]
            y_rows = [b.gep(y.data, [b.mul(b.add(r, _i64(j)), y_stride)]) for j in range(rows)]
            # several outputs at once are several streams: each is followed by the same one of the next block
            row = b.mul(inner, _i64(dtype.bitwidth // 8))
            ahead = _i64(AHEAD) if outputs == 1 else b.mul(row, _i64(BLOCK if shared else outputs))
            ahead = b.add(ahead, b.mul(part, b.udiv(row, parts)))
            with cgutils.for_range_slice(b, first, last, _i64(outputs)) as (n, _):
                w_rows = [b.gep(w.data, [b.mul(b.add(n, _i64(i)), inner)]) for i in range(outputs)]
                sums = _dot(b, w_rows, x_rows, inner, dtype, rounded, ahead, parts if shared else None)
                for (i, j), total in sums.items():
                    b.store(_fold(b, total), b.gep(y_rows[j], [b.add(n, _i64(i))]))
            return context.get_dummy_value()

        return types.void(w, x, y, first, last, r, part, parts), generate

    return products


def _dot(b, w_rows, x_rows, inner, dtype, rounded, ahead, parts):
    """Emit the loop over ``inner``; the sums of each pair of rows, as vectors."""
    width = LANES * (2 if rounded else 1)  # numbers of one register
    consumed = width * UNROLL * dtype.bitwidth // 8  # bytes of each stream of weights in a round
    before, loop, after = b.block, b.append_basic_block("dot"), b.append_basic_block("dot.end")
    b.branch(loop)
    b.position_at_end(loop)
    k = b.phi(_i64)
    k.add_incoming(_i64(0), before)
    asked = b.phi(_i64)
    asked.add_incoming(ahead, before)
    zero = ir.Constant(_vector, [0.0] * LANES)
    pairs = [(i, j, u) for i in range(len(w_rows)) for j in range(len(x_rows)) for u in range(UNROLL)]
    sums = {pair: b.phi(_vector) for pair in pairs}
    for partial in sums.values():
        partial.add_incoming(zero, before)
    kind, align = (_pairs, 2) if rounded else (_vector, 4)
    fma = _declare(b, f"llvm.fma.v{LANES}f32", _vector, [_vector] * 3)
    dot = _declare(b, "llvm.x86.avx512bf16.dpbf16ps.512", _vector, [_vector, _pairs, _pairs]) if rounded else None
    at = [b.add(k, _i64(u * width)) for u in range(UNROLL)]
    activations = [[_load(b, b.gep(row, [place]), kind, align) for place in at] for row in x_rows]
    new = {}
    for i, row in enumerate(w_rows):
        for line in range(1 if parts else consumed // 64):
            _prefetch(b, row, b.add(asked, _i64(64 * line)))
        for u, place in enumerate(at):
            pointer = b.gep(row, [place])
            values = _load(b, pointer, _pairs, 2) if rounded else _load_weights(b, pointer, dtype)
            for j in range(len(x_rows)):
                other, total = activations[j][u], sums[i, j, u]
                new[i, j, u] = b.call(dot, [total, values, other]) if rounded else b.call(fma, [values, other, total])
    following = b.add(k, _i64(width * UNROLL))
    k.add_incoming(following, b.block)
    asked.add_incoming(b.add(asked, b.udiv(_i64(consumed), parts) if parts else _i64(consumed)), b.block)
    for pair, partial in sums.items():
        partial.add_incoming(new[pair], b.block)
    b.cbranch(b.icmp_signed("<", following, inner), loop, after)
    b.position_at_end(after)
    totals = {}
    for i, j, u in pairs:
        totals[i, j] = b.fadd(totals[i, j], new[i, j, u]) if u else new[i, j, u]
    return totals


def multiplies_pairs() -> bool:
    """Whether this processor has AVX-512 BF16 and numba compiles for it, not for another that was asked for."""
    return not (config.CPU_NAME or config.CPU_FEATURES) and get_host_cpu_features().get("avx512bf16", False)


def _declare(b, name, result, arguments):
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def _load(b, pointer, kind, align):
    loaded = b.load(b.bitcast(pointer, kind.as_pointer()))
    loaded.align = align
    return loaded


def _prefetch(b, pointer, ahead):
    i32 = ir.IntType(32)
    call = _declare(b, "llvm.prefetch.p0i8", ir.VoidType(), [_byte, i32, i32, i32])
    b.call(call, [b.gep(b.bitcast(pointer, _byte), [ahead]), i32(0), i32(3), i32(1)])  # to read, and into every cache


def _load_weights(b, pointer, dtype):
    """16 weights as fp32."""
    if dtype == types.float32:
        return _load(b, pointer, _vector, 4)
    wide = ir.VectorType(ir.IntType(32), LANES)  # bf16 is the upper half of fp32
    bits = b.zext(_load(b, pointer, ir.VectorType(ir.IntType(16), LANES), 2), wide)
    return b.bitcast(b.shl(bits, ir.Constant(wide, [16] * LANES)), _vector)


def _fold(b, vector):
    """The sum of a vector's lanes, halves onto halves."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        low, high = (
            b.shuffle_vector(
                vector, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(at, at + lanes)))
            )
            for at in (0, lanes)
        )
        vector = b.fadd(low, high)
    return b.extract_element(vector, ir.IntType(32)(0))


@intrinsic
def _power_of_two(typing_context, exponent):
    """2 ** exponent (int32 from -126 to 127) as fp32, by its bits."""

    def generate(context, b, signature, arguments):
        i32 = ir.IntType(32)
        return b.bitcast(b.shl(b.add(arguments[0], i32(127)), i32(23)), _f32)

    return types.float32(types.int32), generate


@intrinsic
def _bits(typing_context, number):
    """The 32 bits of an fp32 number."""

    def generate(context, b, signature, arguments):
        return b.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@_jit()
def round_to_bf16(x, rounded):
    """``rounded`` (R, K) int16: x in bf16, ties to even."""
    for r in range(x.shape[0]):
        for k in range(x.shape[1]):
            bits = _bits(x[r, k])
            upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            rounded[r, k] = np.int16(upper if x[r, k] == x[r, k] else np.uint32(0x7FC0))  # NaN stays one


def _operand(x, low):
    """What a product reads: x (R, K), or x in bf16 in ``low``, where that is int16."""


@overload(_operand)
def _choose_operand(x, low):
    if low.dtype == types.float32:
        return lambda x, low: x

    def rounded(x, low):
        some = low[:, : x.shape[1]]
        round_to_bf16(x, some)
        return some

    return rounded


_one_by_one, _one_by_two, _two_by_three, _two_by_four = (
    _make_products(outputs, rows) for outputs, rows in ((1, 1), (1, 2), (2, 3), (2, 4))
)
_shared = [_make_products(2, rows, shared=True) for rows in (1, 2, 3, 4)]
_shared_one, _shared_two, _shared_three, _shared_four = _shared


@_jit()
def _few_rows(w, x, y, first, last):
    """One stream of weights after the other: the memory is the limit, not the registers."""
    rows = x.shape[0]
    for r in range(0, rows - 1, 2):
        _one_by_two(w, x, y, first, last, r, 0, 1)
    if rows % 2:
        _one_by_one(w, x, y, first, last, rows - 1, 0, 1)


@_jit()
def _products(w, x, y, first, last):
    """Outputs ``first`` up to ``last`` of every row."""
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


@_jit()
def _share(count, shares, number):
    """First and last + 1 of the outputs of one thread, in whole blocks."""
    blocks = (count + BLOCK - 1) // BLOCK
    return min(blocks * number // shares * BLOCK, count), min(blocks * (number + 1) // shares * BLOCK, count)


@_jit(parallel=True)
def project(w, bias, x, y, threads):
    """y (R, N) = x (R, K) @ w (N, K).T + bias; ``bias`` is empty where there is none; K a multiple of 32."""
    for thread in prange(threads):
        first, last = _share(w.shape[0], threads, thread)
        _products(w, x, y, first, last)
        if bias.size:
            for r in range(x.shape[0]):
                for n in range(first, last):
                    y[r, n] += bias[n]


_EXACT = {"contract", "nnan", "ninf", "nsz"}  # no reassociation: the reduction of the argument depends on the order
_FAST = {"contract", "nnan", "ninf", "nsz", "reassoc", "arcp"}


@_jit(fastmath=_EXACT)
def exp(x):
    """e ** x in fp32 within 2 units in the last place, in operations that vectorize (Cody and Waite, 1980)."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.float32(math.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    f = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    return (p * f * f + f + np.float32(1.0)) * _power_of_two(np.int32(n))


@_jit(parallel=True, fastmath=_EXACT)
def project_gated(w, x, y, threads):
    """y (R, F) = SiLU(x @ gate.T) * (x @ up.T) with gate and up (F, K) one below the other in w; y is (R, 2 F)."""
    half = w.shape[0] // 2
    for thread in prange(threads):
        first, last = _share(half, threads, thread)
        _products(w, x, y, first, last)
        _products(w, x, y, half + first, half + last)
        for r in range(x.shape[0]):
            for n in range(first, last):
                gate = y[r, n]
                y[r, n] = gate / (np.float32(1.0) + exp(-gate)) * y[r, half + n]


@_jit(parallel=True, fastmath=_EXACT)
def project_gelu(w, bias, x, y, threads):
    """y (R, F) = GELU(x @ w.T + bias), by its tanh approximation."""
    for thread in prange(threads):
        first, last = _share(w.shape[0], threads, thread)
        _products(w, x, y, first, last)
        for r in range(x.shape[0]):
            for n in range(first, last):
                v = y[r, n] + bias[n]
                u = np.float32(1.5957691216) * (v + np.float32(0.044715) * v * v * v)  # twice sqrt(2 / pi)
                y[r, n] = v / (np.float32(1.0) + exp(-u))  # (1 + tanh(u / 2)) / 2 is the logistic function of u


@_jit(fastmath=_FAST)
def normalize(x, weight, bias, eps, y):
    """y (R, D): RMSNorm of x, or LayerNorm where ``bias`` is not empty."""
    width = x.shape[1]
    for r in range(x.shape[0]):
        mean = np.float32(0.0)
        if bias.size:
            for d in range(width):
                mean += x[r, d]
            mean /= np.float32(width)
        square = np.float32(0.0)
        for d in range(width):
            square += (x[r, d] - mean) * (x[r, d] - mean)
        scale = np.float32(1.0) / np.sqrt(square / np.float32(width) + np.float32(eps))
        for d in range(width):
            y[r, d] = (x[r, d] - mean) * scale * weight[d]
        if bias.size:
            for d in range(width):
                y[r, d] += bias[d]


@_jit(parallel=True, fastmath=_FAST)
def attend(qkv, cosines, sines, keys, values, lengths, scores, y):
    """One query a row and head over its cached keys, after the new key and value have been appended.

    Args:
        qkv: (R, 3 D), changed in place by the rotary embedding.
        cosines, sines: (positions, Dh / 2); empty without rotary embedding.
        keys, values: (at least R, H, C, Dh), one layer of the cache.
        lengths: (R,), positions filled before this one.
        scores: (R, H, C), receives the attention weights.
        y: (R, D), receives the result.
    """
    heads, width = keys.shape[1], keys.shape[3]
    half, model = width // 2, y.shape[1]
    scale = np.float32(1.0 / math.sqrt(width))
    for task in prange(lengths.shape[0] * heads):
        r, h = task // heads, task % heads
        at, count = lengths[r], lengths[r] + 1
        q = qkv[r, h * width : (h + 1) * width]
        k = qkv[r, model + h * width : model + (h + 1) * width]
        v = qkv[r, 2 * model + h * width : 2 * model + (h + 1) * width]
        if cosines.size:
            for d in range(half):
                c, s = cosines[at, d], sines[at, d]
                low, high = q[d], q[d + half]
                q[d], q[d + half] = low * c - high * s, high * c + low * s
                low, high = k[d], k[d + half]
                k[d], k[d + half] = low * c - high * s, high * c + low * s
        for d in range(width):
            keys[r, h, at, d] = k[d]
            values[r, h, at, d] = v[d]
        weights = scores[r, h]
        largest = np.float32(-3e38)
        for p in range(count):
            dot = np.float32(0.0)
            for d in range(width):
                dot += q[d] * keys[r, h, p, d]
            weights[p] = dot * scale
            largest = max(largest, weights[p])
        total = np.float32(0.0)
        for p in range(count):
            weights[p] = exp(weights[p] - largest)
        for p in range(count):
            total += weights[p]
        for p in range(count):
            weights[p] /= total
        result = y[r, h * width : (h + 1) * width]
        result[:] = np.float32(0.0)
        for p in range(count):
            for d in range(width):
                result[d] += weights[p] * values[r, h, p, d]


@_jit()
def add(x, y):
    """x += y, (R, D)."""
    for r in range(x.shape[0]):
        for d in range(x.shape[1]):
            x[r, d] += y[r, d]


@_jit()
def block(x, norm1, qkv, out, norm2, up, down, turn, cache, lengths, gated, scratch, threads):
    """One pre-norm block on the residual stream x (R, D), in place.

    ``norm1``, ``norm2``: (weight, bias, eps); ``qkv``, ``out``, ``up``, ``down``: (weight, bias); ``turn``: cosines and
    sines; ``cache``: keys and values of this layer.
    ``scratch``: h and narrow (R, D), wide (R, 3 D), scores (R, H, C), inner (R, F or 2 F), and low (R, widest input)
    int16 for activations in bf16, or an empty fp32 array for activations in fp32.
    """
    h, narrow, wide, scores, inner, low = scratch
    normalize(x, norm1[0], norm1[1], norm1[2], h)
    project(qkv[0], qkv[1], _operand(h, low), wide, threads)
    attend(wide, turn[0], turn[1], cache[0], cache[1], lengths, scores, h)
    project(out[0], out[1], _operand(h, low), narrow, threads)
    add(x, narrow)
    normalize(x, norm2[0], norm2[1], norm2[2], h)
    if gated:
        project_gated(up[0], _operand(h, low), inner, threads)
    else:
        project_gelu(up[0], up[1], _operand(h, low), inner, threads)
    project(down[0], down[1], _operand(inner[:, : down[0].shape[1]], low), narrow, threads)
    add(x, narrow)


@_jit()
def head(x, norm, linear, logits, scratch, threads):
    """``logits`` (R, V) of the residual stream x (R, D); arguments as for ``block``."""
    normalize(x, norm[0], norm[1], norm[2], scratch[0])
    project(linear[0], linear[1], _operand(scratch[0], scratch[5]), logits, threads)
