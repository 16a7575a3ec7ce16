"""What encoder, flow estimator and vocoder share: layers over frames, utterances of several lengths in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.onednn import linear
from ..device.devices import on_device
from ..layers import Norm


@dataclass(frozen=True)
class Conv:
    """A causal convolution over frames, ``weight`` (out, in, K)."""

    weight: Tensor
    bias: Tensor | None


def convolve(conv: Conv, x: Tensor) -> Tensor:
    """A causal convolution of (R, T, in) in the weights' format, and in that: (R, T, out)."""
    x, width = x.to(conv.weight.dtype), conv.weight.size(-1)
    if width == 1:
        return linear(x, conv.weight[..., 0], conv.bias)
    # zeros at both ends, because those before cost nothing then; what sees those behind is cut off
    return F.conv1d(x.transpose(1, 2), conv.weight, conv.bias, padding=width - 1)[..., : x.size(1)].transpose(1, 2)


def normalize(norm: Norm, x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, in fp32 and to fp32."""
    # the layout that the norm wants is made together with the cast, where there is one
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    return F.layer_norm(x, (x.size(-1),), norm.weight, norm.bias, norm.eps)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Parts (1, C, n) of different n one below the other, (R, C, longest n), zeros behind the shorter ones."""
    longest = max(part.size(2) for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.size(2))) for part in parts])


def valid_frames(lengths: Sequence[int], total: int, device: torch.device) -> Tensor | None:
    """(R, total) bool, the frames before each length; ``None`` where nothing is padding."""
    if all(length == total for length in lengths):
        return None
    places = torch.arange(total, device=device)[None]
    if len(lengths) == 1:
        return places < lengths[0]  # a number needs no copy
    return places < on_device(torch.tensor(list(lengths)), device)[:, None]


def whole_blocks(frames: int, dtype: torch.dtype, device: torch.device, multiple: int = 8) -> int:
    """``frames``, or where half precision is computed on a CPU the next multiple of 8.

    oneDNN's products take up to a quarter longer there for numbers of rows that are no multiples (806 and 802, not 804,
    with AVX-512 BF16), and masks cost this package's kernels of attention nothing.
    """
    on_cpu = device.type == "cpu" and dtype != torch.float32 and not torch.compiler.is_compiling()
    return -(-frames // multiple) * multiple if on_cpu else frames
