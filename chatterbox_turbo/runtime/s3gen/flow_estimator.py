"""The velocity network of flow matching: a causal U-Net of one resolution with transformer blocks.

Computes what upstream's ``ConditionalDecoder`` does (``models/s3gen/decoder.py``), arranged for speed: frames stay
rows (R, T, C) from end to end; convolutions are causal and padding lies at the end, so that masks matter to attention
alone, and only where utterances of several lengths share a batch; what no step changes comes in ready (``Constant``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.onednn import linear
from ..device.attention_kernels import Boundaries, Kernel
from ..layers import Norm
from . import tiled_block
from .attention import attend
from .frames import Conv, convolve, normalize
from .scratch import Scratch
from .tiled_block import Block


@dataclass(frozen=True)
class Resnet:
    """Two convolutions, each with LayerNorm and Mish, a time embedding between them, and a projected shortcut."""

    first: Conv
    first_norm: Norm
    second: Conv
    second_norm: Norm
    shortcut: Conv


@dataclass(frozen=True)
class Stage:
    """A resnet and its transformer blocks; ``after``: the convolution that ends the way down and the way up."""

    resnet: Resnet
    blocks: tuple[Block, ...]
    after: Conv | None = None


@dataclass(frozen=True)
class EstimatorWeights:
    """The first stage is the way down, the last the way up, which gets the first one's output beside its input.

    Attributes:
        noisy, noisy_shortcut: the first stage's convolution and shortcut over the state alone, (out, 80, K), no bias.
        given, given_shortcut: the same over mean, speaker and condition, (out, 240, K).
        heads: attention heads H.
    """

    stages: tuple[Stage, ...]
    noisy: Conv
    noisy_shortcut: Conv
    given: Conv
    given_shortcut: Conv
    final: Conv
    final_norm: Norm
    projection: Conv
    heads: int

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the matrices."""
        return self.stages[0].blocks[0].qkv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.final.weight.device


@dataclass(frozen=True)
class Constant:
    """What the first stage makes of mean, speaker and condition: (R, T, C) before its first norm, and its shortcut."""

    first: Tensor
    shortcut: Tensor


def constant(weights: EstimatorWeights, mean: Tensor, speaker: Tensor, condition: Tensor) -> Constant:
    """The part of the first stage that is the same in every step.

    Args:
        mean, condition: (R, T, 80) fp32, zero past the end of an utterance.
        speaker: (R, 80) fp32.
    """
    given = torch.cat([mean, speaker[:, None].expand_as(mean), condition], dim=-1).to(weights.dtype)
    parts = (convolve(conv, given).float().contiguous() for conv in (weights.given, weights.given_shortcut))
    return Constant(*parts)


def velocity(
    weights: EstimatorWeights,
    state: Tensor,
    start: Constant,
    times: Tensor,
    bias: Tensor | None,
    scratch: Scratch,
    kernel: Kernel | None = None,
) -> Tensor:
    """(R, T, 80) fp32: where the state moves.

    No host sync and no shape that depends on values: it can be captured in a CUDA graph.

    Args:
        state: (B, T, 80) fp32; R is a multiple of B, and row r of R goes with row r mod B.
        times: (stages, C) fp32, each resnet's own projection of the time.
        bias: (R, 1, 1, T) in the weights' format, which hides frames from attention (``attention.hiding``); ``None``
            where it sees all of them.
        scratch: memory for intermediate results.
        kernel: of attention; ``None``: what is fastest (``attention.attend``).
    """
    hidden = bias if kernel is None else kernel.hide(bias)
    state, dtype = state.to(weights.dtype), weights.dtype
    first = _plus(start.first, convolve(weights.noisy, state))
    shortcut = _plus(start.shortcut, convolve(weights.noisy_shortcut, state))
    last = len(weights.stages) - 1
    x = skip = None
    for index, stage in enumerate(weights.stages):
        if index:
            x = (torch.cat([x, skip], dim=-1) if index == last else x).to(dtype)  # once for both
            first, shortcut = convolve(stage.resnet.first, x), convolve(stage.resnet.shortcut, x)
        x = _sum_as(dtype, _activate(stage.resnet.first_norm, first), times[index])
        x = _activate(stage.resnet.second_norm, convolve(stage.resnet.second, x)) + shortcut
        for block in stage.blocks:
            x = _transform(block, x, weights.heads, hidden, scratch, kernel)
        if index == 0:
            skip = x
        if stage.after is not None:
            x = convolve(stage.after, x)
    return convolve(weights.projection, _activate(weights.final_norm, convolve(weights.final, x))).float()


def _activate(norm: Norm, x: Tensor) -> Tensor:
    return F.mish(normalize(norm, x))


def _plus(start: Tensor, x: Tensor) -> Tensor:
    """(R, T, C) of ``start``, to whose row r is added row r mod B of ``x`` (B, T, C)."""
    return (start.unflatten(0, (-1, x.size(0))) + x).flatten(0, 1)


def _sum_as(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a + b, computed in their own format and rounded to another; on CUDA by one kernel."""
    return torch.add(a, b, out=torch.empty(a.shape, dtype=dtype, device=a.device))


def _transform(
    block: Block,
    x: Tensor,
    heads: int,
    hidden: Tensor | Boundaries | None,
    scratch: Scratch,
    kernel: Kernel | None,
) -> Tensor:
    """One transformer block; the residual stream (R, T, C) is fp32, the rest in the weights' format."""
    dtype, tiled = block.qkv.weight.dtype, tiled_block.suits(block, x)
    if tiled:
        parts = tiled_block.queries_keys_values(block, x, scratch)
    else:
        parts = linear(normalize(block.attention_norm, x).to(dtype), block.qkv.weight)
    parts = parts.unflatten(-1, (3, heads, -1)).unbind(dim=2)
    attended = attend(*(part.transpose(1, 2) for part in parts), hidden, scratch, kernel=kernel)
    attended = attended.transpose(1, 2).flatten(2)
    if tiled:
        return tiled_block.finish(block, x, attended, scratch)
    x = x + linear(attended, block.out.weight, block.out.bias)
    h = F.gelu(linear(normalize(block.mlp_norm, x).to(dtype), block.up.weight, block.up.bias))
    return x + linear(h, block.down.weight, block.down.bias)


def sinusoids(times: Tensor, width: int, scale: float = 1000.0) -> Tensor:
    """(S, width) of times (S,): sines, then cosines, as upstream's ``SinusoidalPosEmb`` with the same rounding."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=times.device).float() * -(math.log(10000) / (half - 1)))
    angles = scale * times[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
