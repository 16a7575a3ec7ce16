"""A transposed convolution over time in pieces of one length.

oneDNN compiles code for each shape of one, and the longer it is, the more: HiFT's three take 0.8 s together for 300 mel
frames that are computed in 25 ms (oneDNN 3.5 of torch 2.6, AVX-512), and every utterance has another length. Its other
convolutions take milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

PIECE = 256  # positions of the input


def suitable(options: dict[str, Any]) -> bool:
    """Whether ``in_pieces`` computes a transposed convolution of such options."""
    plain = {"dilation": (1,), "groups": 1, "output_padding": (0,)}
    return all(options.get(name, value) == value for name, value in plain.items())


def in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """(B, out, n) fp32 of x (B, in, T), as ``F.conv_transpose1d`` but for the order of the sums.

    What a row gives does not depend on the others. Arguments as of ``F.conv_transpose1d``, ``suitable`` ones.
    """
    (stride,), (padding,) = options["stride"], options["padding"]
    rows, _, length = x.shape
    width = weight.size(2)
    total = (length - 1) * stride - 2 * padding + width
    # positions on either side that reach into a piece, and as many as it takes to have all of its output
    beside = -(-max(width - 1 - padding, padding, stride + 2 * padding - width) // stride)
    padded = F.pad(x, (beside, beside + -length % PIECE))
    result = x.new_empty(rows, weight.size(1), total)
    for row in range(rows):
        for begin in range(0, length, PIECE):
            piece = padded[row : row + 1, :, begin : begin + PIECE + 2 * beside]
            computed = F.conv_transpose1d(piece, weight, bias, **options)
            first = begin * stride
            end = total if begin + PIECE >= length else min(first + PIECE * stride, total)
            if end <= first:
                continue  # all of it is cut off as padding
            result[row, :, first:end] = computed[0, :, beside * stride : beside * stride + end - first]
    return result
