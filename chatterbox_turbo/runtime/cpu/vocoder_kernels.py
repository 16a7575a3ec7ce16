"""What HiFT does between its convolutions, over moments in whose rows all channels lie: one reading, one writing.

Snake (2020) is x + sin(alpha x)^2 / alpha. A square of a sine has half its period and no sign, so that the argument is
reduced by multiples of pi, and the sine is needed between -pi / 2 and pi / 2 alone. A transposed convolution is a
product, and the sum of what it gives for each moment where that falls.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from .instructions import EXACT, ROUNDER, jit, narrow, widen

SOME = 64  # rows of one task
_PER_PI = np.float32(1 / np.pi)
# pi in three parts, of which multiples up to 2 ** 12 are exact (Cody and Waite, 1980)
_PI = tuple(np.float32(part) for part in (3.140625, 9.67502593994140625e-4, 1.509957990978376432e-7))


@jit(fastmath=EXACT)
def _square_of_sine(x):
    """sin(x) ** 2 in fp32 for x up to 10,000, in operations that vectorize."""
    turns = (x * _PER_PI + ROUNDER) - ROUNDER
    x = ((x - turns * _PI[0]) - turns * _PI[1]) - turns * _PI[2]
    z = x * x
    p = np.float32(2.605705885304889e-6)  # the least relative error: 6e-9
    p = p * z + np.float32(-1.9809570943783977e-4)
    p = p * z + np.float32(8.333065838200067e-3)
    p = p * z + np.float32(-0.16666659535811126)
    sine = p * z * x + x
    return sine * sine


@jit(parallel=True, fastmath=EXACT)
def activate(x, result, alpha, inverse):
    """``result`` (N, C) of x (N, C); either in fp32 or as the bits of bf16, and they may be the same."""
    rows, channels = x.shape
    for task in prange((rows + SOME - 1) // SOME):
        for row in range(task * SOME, min((task + 1) * SOME, rows)):
            for c in range(channels):
                value = widen(x[row, c])
                result[row, c] = narrow(value + inverse[c] * _square_of_sine(alpha[c] * value), result[row, c])


@jit(parallel=True, fastmath=EXACT)
def add_and_activate(x, result, more, alpha, inverse):
    """``activate`` of x + ``more``, which x becomes; more (N, C) fp32 or bits of bf16."""
    rows, channels = x.shape
    for task in prange((rows + SOME - 1) // SOME):
        for row in range(task * SOME, min((task + 1) * SOME, rows)):
            for c in range(channels):
                value = x[row, c] + widen(more[row, c])
                x[row, c] = value
                result[row, c] = narrow(value + inverse[c] * _square_of_sine(alpha[c] * value), result[row, c])


@jit(parallel=True, fastmath=EXACT)
def overlap_add(product, bias, stride, padding, result):
    """``result`` (B, n, C): what T moments give, ``stride`` apart, added up where they overlap, and ``bias`` (C,).

    Args:
        product: (B, T, C, K); the first ``padding`` of all places are cut off.
    """
    rows, moments, channels, width = product.shape
    length = result.shape[1]
    for task in prange(rows * ((length + SOME - 1) // SOME)):
        row, begin = task % rows, task // rows * SOME
        for place in range(begin, min(begin + SOME, length)):
            at = place + padding
            first, last = max((at - width) // stride + 1, 0), min(at // stride, moments - 1)
            for c in range(channels):
                result[row, place, c] = bias[c]
            for moment in range(first, last + 1):
                for c in range(channels):
                    result[row, place, c] += product[row, moment, c, at - moment * stride]
