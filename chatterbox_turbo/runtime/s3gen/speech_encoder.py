"""The encoder of speech tokens: a transformer at the tokens' rate, upsampling, and another at the frames'.

Computes what upstream's ``UpsampleConformerEncoder`` does (``models/s3gen/transformer/upsample_encoder.py``). Attention
knows relative positions (Transformer-XL, 2019); here the scores of a head are shifted by reading them with other
strides, and never copied. Utterances of several lengths share a batch: masks matter to attention, and to the one layer
that looks ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.onednn import linear
from ..device.attention_kernels import Kernel
from ..layers import Linear, Norm
from .attention import Relative, attend, attends_in_caches, hiding, prepare
from .frames import Conv, convolve, normalize, valid_frames, whole_blocks
from .scratch import Scratch


@dataclass(frozen=True)
class Layer:
    """One pre-norm block; the biases (H, Dh) are added to queries that meet contents and positions."""

    attention_norm: Norm
    qkv: Linear
    positions: Linear  # no bias
    content_bias: Tensor
    position_bias: Tensor
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Stack:
    """What runs at one rate: a projection, its norm, and layers."""

    embed: Linear
    embed_norm: Norm
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class EncoderWeights:
    """Everything that the encoder reads.

    Attributes:
        look_ahead: a convolution over a token and those after it, and a causal one.
        upsampling: causal, over tokens repeated ``stride`` times.
        heads: attention heads H.
    """

    tokens: Stack
    look_ahead: tuple[Conv, Conv]
    upsampling: Conv
    stride: int
    frames: Stack
    final_norm: Norm
    heads: int


class SpeechEncoder:
    """Embedded speech tokens to hidden states of frames, for one utterance or several.

    ``kernel``: of attention; ``None``: what is fastest.
    """

    @torch.inference_mode(False)
    def __init__(self, weights: EncoderWeights, kernel: Kernel | None = None):
        self.weights, self._kernel, self._scratch = weights, kernel, Scratch()
        device, width = weights.final_norm.weight.device, weights.final_norm.weight.numel()
        rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
        self._rates = rates.to(device)
        self._table = torch.empty(0, width, device=device)
        if kernel is None:
            prepare(attention_format(weights.tokens.embed.weight.dtype, device), device, positions=True)

    def __call__(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """(R, T, D) to (R, stride T, D) fp32; ``lengths``: tokens of each row, beyond which nothing is meant."""
        weights, given = self.weights, x.size(1)
        # so that frames are multiples of 8
        tokens = whole_blocks(given, weights.tokens.embed.weight.dtype, x.device, 8 // math.gcd(8, weights.stride))
        x = F.pad(x, (0, 0, 0, tokens - given))
        valid = valid_frames(lengths, tokens, x.device)
        x = _embed(weights.tokens, x)
        if valid is not None:
            x = x * valid[..., None]
        ahead, behind = weights.look_ahead
        reach = ahead.weight.size(-1) - 1
        seen = F.leaky_relu(convolve(ahead, F.pad(x, (0, 0, 0, reach)))[:, reach:].float())
        x = self._transform(weights.tokens, x + convolve(behind, seen).float(), valid)
        x = convolve(weights.upsampling, x.repeat_interleave(weights.stride, dim=1)).float()
        valid = valid_frames([weights.stride * length for length in lengths], weights.stride * tokens, x.device)
        x = self._transform(weights.frames, _embed(weights.frames, x), valid)
        return normalize(weights.final_norm, x[:, : weights.stride * given])

    def release(self) -> None:
        """Give buffers back."""
        self._scratch.release()
        self._table = self._table[:0]

    def _transform(self, stack: Stack, x: Tensor, valid: Tensor | None) -> Tensor:
        table = self._positions(x.size(1)).to(stack.embed.weight.dtype)
        bias = hiding(valid, attention_format(stack.embed.weight.dtype, x.device))
        for layer in stack.layers:
            x = self._layer(layer, x, table, bias)
        return x

    def _layer(self, layer: Layer, x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        heads, dtype = self.weights.heads, layer.qkv.weight.dtype
        wide = attention_format(dtype, x.device)
        h = linear(normalize(layer.attention_norm, x).to(dtype), layer.qkv.weight, layer.qkv.bias).to(wide)
        q, k, v = h.unflatten(-1, (3, heads, -1)).unbind(dim=2)
        keys = linear(table, layer.positions.weight).to(wide)
        keys = keys.unflatten(-1, (heads, -1)).transpose(0, 1).contiguous()
        queries = (q + layer.position_bias.to(wide)) * q.size(-1) ** -0.5
        relative = Relative(queries.transpose(1, 2).contiguous(), keys)
        q = q + layer.content_bias.to(wide)
        parts = (part.transpose(1, 2) for part in (q, k, v))
        attended = attend(*parts, bias, self._scratch, relative, self._kernel).to(dtype)
        x = x + linear(attended.transpose(1, 2).flatten(2), layer.out.weight, layer.out.bias)
        h = F.silu(linear(normalize(layer.mlp_norm, x).to(dtype), layer.up.weight, layer.up.bias))
        return x + linear(h, layer.down.weight, layer.down.bias)

    @torch.inference_mode(False)  # kept for calls outside of inference mode
    def _positions(self, frames: int) -> Tensor:
        """(2 T - 1, D) fp32: sinusoids of the distances T - 1 to 1 - T, sines and cosines in turns."""
        if len(self._table) < 2 * frames - 1:
            distances = torch.arange(frames - 1, -frames, -1, dtype=torch.float32, device=self._rates.device)
            angles = distances[:, None] * self._rates
            self._table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        middle = len(self._table) // 2
        return self._table[middle - frames + 1 : middle + frames]


def attention_format(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The format in which the encoder attends, where its weights are in ``dtype``."""
    # torch's kernels for CPUs are slower in half precision where positions are relative
    return dtype if device.type != "cpu" or attends_in_caches(dtype, device) else torch.float32


def _embed(stack: Stack, x: Tensor) -> Tensor:
    embed = stack.embed
    x = normalize(stack.embed_norm, linear(x.to(embed.weight.dtype), embed.weight, embed.bias).float())
    return x * math.sqrt(x.size(-1))
