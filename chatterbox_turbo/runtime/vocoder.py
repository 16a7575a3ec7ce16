"""HiFTNet (2023): mel frames to samples by a source of harmonics, convolutions and an inverse short-time transform.

Computes what upstream's ``HiFTGenerator`` does (``models/s3gen/hifigan.py``), to the bit: harmonics in one
product, activations in place and in parts that fit a cache; weight normalization can be folded before. The random
numbers are drawn in upstream's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .frames import stacked, valid_frames
from .scratch import Scratch

PART = 2**19  # bytes of an activation at once


@dataclass(frozen=True)
class Convolution:
    """A convolution over time, or a transposed one.

    Attributes:
        direction: the weight, or where there is a ``magnitude``, what weight normalization (2016) scales to it.
        options: stride, padding, dilation.
    """

    direction: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    options: dict[str, Any]
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight, computed anew where it is normalized."""
        return self.direction if self.magnitude is None else torch._weight_norm(self.direction, self.magnitude, 0)


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
    source = excite(weights, mel, cached)
    return _samples(weights, _decode(weights, mel, _spectrum(weights, source), scratch)), source


def synthesize_all(
    weights: VocoderWeights, mels: Sequence[Tensor], sources: Sequence[Tensor], scratch: Scratch
) -> list[Tensor]:
    """Samples (1, n) of utterances (1, 80, T) of several lengths in one batch, from sources (1, 1, n).

    Only the network between the transforms is shared; behind the end of an utterance every convolution reads zeros,
    as it does when the utterance is alone.
    """
    lengths = [mel.size(2) for mel in mels]
    spectra = [_spectrum(weights, source) for source in sources]
    frames = _decode(weights, stacked(mels), stacked(spectra), scratch, lengths)
    ends = [spectrum.size(2) for spectrum in spectra]
    return [_samples(weights, frames[row : row + 1, :, :end]) for row, end in enumerate(ends)]


def excite(weights: VocoderWeights, mel: Tensor, cached: Tensor | None = None) -> Tensor:
    """The source signal (B, 1, n) of mel frames (B, 80, T); draws random numbers. Arguments as ``synthesize``."""
    source = _excite(weights.source, _pitch(weights, mel))
    if cached is not None and cached.shape[2]:
        source[:, :, : cached.shape[2]] = cached
    return source


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


def _spectrum(weights: VocoderWeights, source: Tensor) -> Tensor:
    """(B, n_fft + 2, F) real, then imaginary parts of source signals (B, 1, n)."""
    n_fft, hop, window = weights.n_fft, weights.hop, weights.window
    spectrum = torch.stft(source.squeeze(1), n_fft, hop, n_fft, window=window, return_complex=True)
    return torch.cat([spectrum.real, spectrum.imag], dim=1)


def _samples(weights: VocoderWeights, x: Tensor) -> Tensor:
    """(B, n) of the network's output (B, n_fft + 2, F): logarithmic magnitudes, then phases."""
    n_fft, hop, window, middle = weights.n_fft, weights.hop, weights.window, weights.n_fft // 2 + 1
    magnitude = torch.exp(x[:, :middle]).clip_(max=1e2)
    phase = torch.sin(x[:, middle:])
    frames = torch.complex(magnitude * torch.cos(phase), magnitude * torch.sin(phase))
    return torch.istft(frames, n_fft, hop, n_fft, window=window).clamp_(-weights.limit, weights.limit)


def _decode(
    weights: VocoderWeights, mel: Tensor, spectrum: Tensor, scratch: Scratch, lengths: Sequence[int] | None = None
) -> Tensor:
    """(B, n_fft + 2, F) of mel frames (B, 80, T); ``lengths``: frames of each row, whose padding has to be zero."""
    x = _convolve(weights.before, mel)
    last, before = len(weights.levels) - 1, list(lengths or ())
    seen = _valid(before, x)
    for index, level in enumerate(weights.levels):
        x = _convolve(level.up, _keep(F.leaky_relu_(x, weights.slope), seen))
        before = [level.up.options["stride"][0] * length for length in before]
        if index == last:
            x, before = F.pad(x, (1, 0), mode="reflect"), [length + 1 for length in before]
        seen = _valid(before, x)
        x += _residual(level.source_block, _convolve(level.source_down, spectrum), scratch, seen)
        total = _residual(level.blocks[0], x.clone(), scratch, seen)
        for block in level.blocks[1:]:
            total += _residual(block, x.clone(), scratch, seen)
        x = total.div_(len(level.blocks))
    return _convolve(weights.after, _keep(F.leaky_relu_(x), seen))


def _valid(lengths: Sequence[int], x: Tensor) -> Tensor | None:
    """(B, 1, T) bool of x (B, C, T), or ``None`` where nothing is padding."""
    valid = valid_frames(lengths, x.size(2), x.device)
    return None if valid is None else valid[:, None]


def _keep(x: Tensor, valid: Tensor | None) -> Tensor:
    """x, in place, with zeros where it is not valid."""
    return x if valid is None else x.mul_(valid)


def _residual(block: ResidualBlock, x: Tensor, scratch: Scratch, valid: Tensor | None) -> Tensor:
    """x, in place."""
    for first_activation, first, second_activation, second in block.steps:
        activated = scratch("activated", x.shape, x.dtype, x.device)
        h = _convolve(first, _keep(_snake(first_activation, x, activated, scratch), valid))
        x += _convolve(second, _keep(_snake(second_activation, h, h, scratch), valid))
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
