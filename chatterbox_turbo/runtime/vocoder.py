"""HiFTNet (2023): mel frames to samples by a source of harmonics, convolutions and an inverse short-time transform.

Computes what upstream's ``HiFTGenerator`` does (``models/s3gen/hifigan.py``), to the bit: weights come in without
their normalization (weight-norm is folded once instead of at every call), harmonics in one product, activations in
place and in parts that fit a cache; the random numbers are drawn in upstream's order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .scratch import Scratch

PART = 2**19  # bytes of an activation at once


@dataclass(frozen=True)
class Convolution:
    """A convolution over time, or a transposed one; ``options``: stride, padding, dilation."""

    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]
    transposed: bool = False


@dataclass(frozen=True)
class Snake:
    """x + sin(alpha x)^2 / alpha, with ``alpha`` and its inverse (1, C, 1)."""

    alpha: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class ResidualBlock:
    """Pairs of convolutions, a Snake before each."""

    steps: tuple[tuple[Snake, Convolution, Snake, Convolution], ...]


@dataclass(frozen=True)
class Upsampling:
    """One resolution: upsample, add the source at that resolution, average the residual blocks."""

    up: Convolution
    source_down: Convolution
    source_block: ResidualBlock
    blocks: tuple[ResidualBlock, ...]


@dataclass(frozen=True)
class Source:
    """The generator of harmonics.

    Attributes:
        rate: samples a second.
        scale: samples a frame.
        harmonics: number of sines, the fundamental included.
        amplitude, noise, threshold: of the sines, of the noise beside them, and in Hz of voiced speech.
        merge: weight (1, harmonics) and bias (1,) that make one signal of them.
    """

    rate: int
    scale: int
    harmonics: int
    amplitude: float
    noise: float
    threshold: float
    merge: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class VocoderWeights:
    """Everything that ``synthesize`` reads.

    Attributes:
        pitch: convolutions of the predictor of the fundamental frequency, an ELU after each.
        pitch_head: weight (1, C) and bias (1,).
        window: (n_fft,) of the transforms.
        limit: largest absolute sample.
    """

    pitch: tuple[Convolution, ...]
    pitch_head: tuple[Tensor, Tensor]
    source: Source
    before: Convolution
    levels: tuple[Upsampling, ...]
    after: Convolution
    window: Tensor
    n_fft: int
    hop: int
    slope: float
    limit: float


def synthesize(weights: VocoderWeights, mel: Tensor, cached: Tensor | None, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Samples (B, n) and the source signal (B, 1, n) of mel frames (B, 80, T), all fp32.

    Args:
        cached: (B, 1, m), the source of the samples before, which replaces its beginning; or ``None``.
        scratch: memory for activations.
    """
    pitch = _pitch(weights, mel)
    source = _excite(weights.source, pitch)
    if cached is not None and cached.shape[2]:
        source[:, :, : cached.shape[2]] = cached
    return _decode(weights, mel, source, scratch), source


def _pitch(weights: VocoderWeights, mel: Tensor) -> Tensor:
    """(B, T) Hz."""
    for convolution in weights.pitch:
        mel = F.elu_(_convolve(convolution, mel))
    return F.linear(mel.transpose(1, 2), *weights.pitch_head).squeeze(-1).abs()


def _excite(source: Source, pitch: Tensor) -> Tensor:
    """(B, 1, n): harmonics where speech is voiced, noise where it is not (neural source filter, 2019)."""
    pitch = pitch[:, None].repeat_interleave(source.scale, dim=-1)
    numbers = torch.arange(1, source.harmonics + 1, device=pitch.device, dtype=torch.int64)[None, :, None]
    turns = pitch * numbers / source.rate
    angles = 2 * math.pi * (torch.cumsum(turns, dim=-1) % 1)
    # drawn on the host, whatever the device, as upstream's distribution is
    low, high = -math.pi, math.pi
    phases = low + torch.rand(pitch.size(0), source.harmonics, 1) * (torch.tensor(high) - torch.tensor(low))
    phases = phases.to(pitch.device)
    phases[:, 0] = 0
    sines = angles.add_(phases).sin_().mul_(source.amplitude)
    voiced = (pitch > source.threshold).to(torch.float32)
    loudness = voiced * source.noise + (1 - voiced) * source.amplitude / 3
    sines = sines * voiced + loudness * torch.randn_like(sines)
    merged = torch.tanh_(F.linear(sines.transpose(1, 2), *source.merge))
    torch.randn_like(voiced)  # a second noise that upstream draws and does not use: the next call begins after it
    return merged.transpose(1, 2)


def _decode(weights: VocoderWeights, mel: Tensor, source: Tensor, scratch: Scratch) -> Tensor:
    n_fft, hop, window = weights.n_fft, weights.hop, weights.window
    spectrum = torch.stft(source.squeeze(1), n_fft, hop, n_fft, window=window, return_complex=True)
    spectrum = torch.cat([spectrum.real, spectrum.imag], dim=1)
    x = _convolve(weights.before, mel)
    last = len(weights.levels) - 1
    for index, level in enumerate(weights.levels):
        x = _convolve(level.up, F.leaky_relu_(x, weights.slope))
        if index == last:
            x = F.pad(x, (1, 0), mode="reflect")
        x += _residual(level.source_block, _convolve(level.source_down, spectrum), scratch)
        total = _residual(level.blocks[0], x.clone(), scratch)
        for block in level.blocks[1:]:
            total += _residual(block, x.clone(), scratch)
        x = total.div_(len(level.blocks))
    x = _convolve(weights.after, F.leaky_relu_(x))
    middle = n_fft // 2 + 1
    magnitude = torch.exp(x[:, :middle]).clip_(max=1e2)
    phase = torch.sin(x[:, middle:])
    frames = torch.complex(magnitude * torch.cos(phase), magnitude * torch.sin(phase))
    return torch.istft(frames, n_fft, hop, n_fft, window=window).clamp_(-weights.limit, weights.limit)


def _residual(block: ResidualBlock, x: Tensor, scratch: Scratch) -> Tensor:
    """x, in place."""
    for first_activation, first, second_activation, second in block.steps:
        activated = scratch("activated", x.shape, x.dtype, x.device)
        h = _convolve(first, _snake(first_activation, x, activated, scratch))
        x += _convolve(second, _snake(second_activation, h, h, scratch))
    return x


def _snake(snake: Snake, x: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
    """Some channels at once, so that what lies between x and ``out`` stays in the cache."""
    rows = max(1, PART // (x.size(0) * x.size(2) * x.element_size())) if x.device.type == "cpu" else x.size(1)
    for at in range(0, x.size(1), rows):
        part = slice(at, at + rows)
        some = x[:, part]
        between = scratch("between", some.shape, x.dtype, x.device)
        torch.mul(some, snake.alpha[:, part], out=between)
        between.sin_().square_().mul_(snake.inverse[:, part])
        torch.add(some, between, out=out[:, part])
    return out


def _convolve(convolution: Convolution, x: Tensor) -> Tensor:
    function = F.conv_transpose1d if convolution.transposed else F.conv1d
    return function(x, convolution.weight, convolution.bias, **convolution.options)
