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
    return samples_of(weights, network, mel, source), source


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
    source = _excite(weights.source, pitch_of(weights, mel))
    if cached is not None and cached.shape[2]:
        source[:, :, : cached.shape[2]] = cached
    return source


def pitch_of(weights: VocoderWeights, mel: Tensor) -> Tensor:
    """The fundamental frequency (B, T) in Hz of mel frames (B, 80, T)."""
    for convolution in weights.pitch:
        mel = F.elu_(convolve(convolution, mel))
    return F.linear(mel.transpose(1, 2), *weights.pitch_head).squeeze(-1).abs()


def random_phases(source: Source, rows: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """(B, harmonics, 1) fp32, the fundamental's 0: where each sine begins; ``generator``: on the host."""
    # drawn on the host, whatever the device, as upstream's distribution is
    low, high = -math.pi, math.pi
    span = torch.tensor(high, dtype=torch.float32, device="cpu") - torch.tensor(low, dtype=torch.float32, device="cpu")
    drawn = torch.rand(rows, source.harmonics, 1, dtype=torch.float32, device="cpu", generator=generator)
    phases = low + drawn * span
    phases[:, 0] = 0
    return on_device(phases, device)


def turns_of(source: Source, pitch: Tensor) -> Tensor:
    """(B, harmonics, T) fp32: how far each sine turns from one sample to the next at ``pitch`` (B, T)."""
    numbers = torch.arange(1, source.harmonics + 1, device=pitch.device, dtype=torch.int64)[None, :, None]
    return pitch[:, None] * numbers / source.rate


def harmonics(source: Source, pitch: Tensor, turned: Tensor, phases: Tensor, noise: Tensor) -> Tensor:
    """The source signal (B, 1, n): harmonics where speech is voiced, else noise (neural source filter, 2019).

    Args:
        pitch: (B, n) of every sample.
        turned: (B, harmonics, n) fp32, turns of each sine so far.
        phases: of ``random_phases``.
        noise: (B, harmonics, n) normal numbers.
    """
    sines = (2 * math.pi * (turned % 1)).add_(phases).sin_().mul_(source.amplitude)
    voiced = (pitch[:, None] > source.threshold).to(torch.float32)
    loudness = voiced * source.noise + (1 - voiced) * source.amplitude / 3
    sines = sines * voiced + loudness * noise
    return torch.tanh_(F.linear(sines.transpose(1, 2), *source.merge)).transpose(1, 2)


def _excite(source: Source, pitch: Tensor) -> Tensor:
    """(B, 1, n) of ``pitch`` (B, T)."""
    pitch = pitch.repeat_interleave(source.scale, dim=-1)
    turned = torch.cumsum(turns_of(source, pitch), dim=-1)
    phases = random_phases(source, pitch.size(0), pitch.device)
    signal = harmonics(source, pitch, turned, phases, torch.randn_like(turned))
    torch.randn_like(pitch)  # a second noise that upstream draws and does not use: the next call begins after it
    return signal


def samples_of(weights: VocoderWeights, network: Network, mel: Tensor, source: Tensor) -> Tensor:
    """Samples (B, n) of mel frames (B, 80, T) and their source signal (B, 1, n)."""
    return _samples(weights, network(mel, _spectrum(weights, source)))


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
