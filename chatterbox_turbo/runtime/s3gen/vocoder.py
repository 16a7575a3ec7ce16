"""HiFTNet (2023): mel frames to samples by a source of harmonics, convolutions and an inverse short-time transform.

Computes what upstream's ``HiFTGenerator`` does (``models/s3gen/hifigan.py``), to the bit: harmonics in one
product; weight normalization can be folded before. The random numbers are drawn in upstream's order. The convolutions
between the transforms are in ``vocoder_network``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device.devices import on_device
from .frames import stacked
from .vocoder_network import Convolution, Network, NetworkWeights, convolve


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
    network: NetworkWeights
    window: Tensor
    n_fft: int
    hop: int
    limit: float


def synthesize(weights: VocoderWeights, network: Network, mel: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor]:
    """Samples (B, n) and the source signal (B, 1, n) of mel frames (B, 80, T), all fp32.

    Args:
        network: of ``weights.network``.
        cached: (B, 1, m), the source of the samples before, which replaces its beginning; or ``None``.
    """
    source = excite(weights, mel, cached)
    return _samples(weights, network(mel, _spectrum(weights, source))), source


def synthesize_all(
    weights: VocoderWeights, network: Network, mels: Sequence[Tensor], sources: Sequence[Tensor]
) -> list[Tensor]:
    """Samples (1, n) of utterances (1, 80, T) of several lengths in one batch, from sources (1, 1, n).

    Only the network between the transforms is shared.
    """
    spectra = [_spectrum(weights, source) for source in sources]
    frames = network(stacked(mels), stacked(spectra), [mel.size(2) for mel in mels])
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
        mel = F.elu_(convolve(convolution, mel))
    return F.linear(mel.transpose(1, 2), *weights.pitch_head).squeeze(-1).abs()


def _excite(source: Source, pitch: Tensor) -> Tensor:
    """(B, 1, n): harmonics where speech is voiced, noise where it is not (neural source filter, 2019)."""
    pitch = pitch[:, None].repeat_interleave(source.scale, dim=-1)
    numbers = torch.arange(1, source.harmonics + 1, device=pitch.device, dtype=torch.int64)[None, :, None]
    turns = pitch * numbers / source.rate
    angles = 2 * math.pi * (torch.cumsum(turns, dim=-1) % 1)
    # drawn on the host, whatever the device, as upstream's distribution is
    low, high = -math.pi, math.pi
    span = torch.tensor(high, dtype=torch.float32, device="cpu") - torch.tensor(low, dtype=torch.float32, device="cpu")
    phases = low + torch.rand(pitch.size(0), source.harmonics, 1, dtype=torch.float32, device="cpu") * span
    phases[:, 0] = 0
    phases = on_device(phases, pitch.device)
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
