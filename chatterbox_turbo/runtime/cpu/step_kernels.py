"""Kernels of one decode step on a CPU, compiled by numba: a block and the head over ``products``."""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from .instructions import FAST, exp, jit, narrow, widen
from .products import operand, project, project_gated, project_gelu


@jit(fastmath=FAST)
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


@jit(parallel=True, fastmath=FAST)
def attend(qkv, cosines, sines, keys, values, lengths, scores, y):
    """One query a row and head over its cached keys, after the new key and value have been appended.

    Args:
        qkv: (R, 3 D), changed in place by the rotary embedding.
        cosines, sines: (positions, Dh / 2); empty without rotary embedding.
        keys, values: (at least R, H, C, Dh), one layer of the cache; fp32, or bf16 as int16.
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
            keys[r, h, at, d] = narrow(k[d], keys[r, h, at, d])
            values[r, h, at, d] = narrow(v[d], values[r, h, at, d])
        weights = scores[r, h]
        largest = np.float32(-3e38)
        for p in range(count):
            dot = np.float32(0.0)
            for d in range(width):
                dot += q[d] * widen(keys[r, h, p, d])
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
                result[d] += weights[p] * widen(values[r, h, p, d])


@jit()
def add(x, y):
    """x += y, (R, D)."""
    for r in range(x.shape[0]):
        for d in range(x.shape[1]):
            x[r, d] += y[r, d]


@jit()
def block(x, norm1, qkv, out, norm2, up, down, turn, cache, lengths, gated, scratch, threads):
    """One pre-norm block on the residual stream x (R, D), in place.

    ``norm1``, ``norm2``: (weight, bias, eps); ``qkv``, ``out``, ``up``, ``down``: (weight, bias), a weight a matrix or
    (codes, scales, zeros); ``turn``: cosines and sines; ``cache``: keys and values of this layer.
    ``scratch``: h and narrow (R, D), wide (R, 3 D), scores (R, H, C), inner (R, F or 2 F), and low, which ``operand``
    describes, for inputs of every width.
    """
    h, narrow, wide, scores, inner, low = scratch
    normalize(x, norm1[0], norm1[1], norm1[2], h)
    project(qkv[0], qkv[1], operand(h, qkv[0], low), wide, threads)
    attend(wide, turn[0], turn[1], cache[0], cache[1], lengths, scores, h)
    project(out[0], out[1], operand(h, out[0], low), narrow, threads)
    add(x, narrow)
    normalize(x, norm2[0], norm2[1], norm2[2], h)
    if gated:
        project_gated(up[0], operand(h, up[0], low), inner, threads)
    else:
        project_gelu(up[0], up[1], operand(h, up[0], low), inner, threads)
    width = inner.shape[1] // 2 if gated else inner.shape[1]
    project(down[0], down[1], operand(inner[:, :width], down[0], low), narrow, threads)
    add(x, narrow)


@jit()
def head(x, norm, linear, logits, scratch, threads):
    """``logits`` (R, V) of the residual stream x (R, D); arguments as for ``block``."""
    normalize(x, norm[0], norm[1], norm[2], scratch[0])
    project(linear[0], linear[1], operand(scratch[0], linear[0], scratch[5]), logits, threads)
