"""A transposed convolution over time in pieces of one length, or by a product.

oneDNN compiles code for each shape of one, and the longer it is, the more: HiFT's three take 0.8 s together for 300 mel
frames that are computed in 25 ms (oneDNN 3.5 of torch 2.6, AVX-512), and every utterance has another length. Its other
convolutions take milliseconds.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .arrays import array
from .onednn import linear
from .threads import kernel_threads

PIECE = 256  # positions of the input


def suitable(options: dict[str, Any]) -> bool:
    """Whether ``in_pieces`` and ``by_product`` compute a transposed convolution of such options."""
    plain = {"dilation": (1,), "groups": 1, "output_padding": (0,)}
    return all(options.get(name, value) == value for name, value in plain.items())


def in_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any], channels_last: bool = False
) -> Tensor:
    """(B, out, n) fp32 of x (B, in, T), as ``F.conv_transpose1d`` but for the order of the sums.

    What a row gives does not depend on the others. Arguments as of ``F.conv_transpose1d``, ``suitable`` ones;
    ``channels_last``: so lies the result in memory.
    """
    (stride,), (padding,) = options["stride"], options["padding"]
    rows, _, length = x.shape
    width, total = weight.size(2), _length(x, weight, options)
    # positions on either side that reach into a piece, and as many as it takes to have all of its output
    beside = -(-max(width - 1 - padding, padding, stride + 2 * padding - width) // stride)
    padded = F.pad(x, (beside, beside + -length % PIECE))
    channels = weight.size(1)
    result = x.new_empty(rows, total, channels).transpose(1, 2) if channels_last else x.new_empty(rows, channels, total)
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


def by_product(x: Tensor, weight: Tensor, bias: Tensor, options: dict[str, Any], kernels: ModuleType) -> Tensor:
    """``in_pieces`` with channels last, of which x has no need to be a copy; ``kernels``: ``vocoder_kernels``.

    For 300 mel frames HiFT's three take 28 ms so, and 68 in pieces (two cores, fp32).
    """
    (stride,), (padding,) = options["stride"], options["padding"]
    inputs, outputs, width = weight.shape
    product = linear(x.transpose(1, 2), weight.reshape(inputs, -1).t()).unflatten(-1, (outputs, width))
    result = x.new_empty(x.size(0), _length(x, weight, options), outputs)
    with kernel_threads():
        kernels.overlap_add(array(product), array(bias), stride, padding, array(result))
    return result.transpose(1, 2)


def _length(x: Tensor, weight: Tensor, options: dict[str, Any]) -> int:
    (stride,), (padding,) = options["stride"], options["padding"]
    return (x.size(2) - 1) * stride - 2 * padding + weight.size(2)
