"""How far samples are from others of the same length, as vocoders are compared: all are 0 for the same, but PESQ."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import numpy as np
import soxr
import torch
from torch import Tensor

from ..runtime.voice.features import MelSpectrogram

RESOLUTIONS = ((512, 128), (1024, 256), (2048, 512))  # window and hop of each short-time transform
FLOOR = 1e-5
PITCH_RATE, LOWEST, HIGHEST = 8000, 60.0, 400.0  # Hz: of the signal that is searched, and of the pitch of speech
PITCH_WINDOW, PITCH_HOP = 400, 80  # 50 and 10 ms of that signal: three periods of 60 Hz
VOICED, LOUD = 0.5, 1e-3  # periodicity from which a frame is voiced; RMS of a frame that is searched
PESQ_RATE = 16_000

SHORT_BANDS, SHORT_WINDOW, SHORT_HOP, SHORT_HIGHEST = 80, 1024, 256, 8000.0  # mel frames that nobody was given

NAMES = (
    "log-mel distance", "short-window log-mel distance", "STFT distance", "periodicity error", "voicing F1",
    "pitch error cents", "PESQ",
)  # fmt: skip
BETTER_HIGH = ("voicing F1", "PESQ")


def distances(ours: Tensor, reference: Tensor, rate: int, mel: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """All of this file by name; those that say nothing here (PESQ without its package, pitch of noise) are missing.

    Args:
        ours, reference: samples (n,) fp32 at ``rate`` Hz.
        mel: samples (1, n) to log-mel frames (1, bands, T).
    """
    found = {
        "log-mel distance": log_mel_distance(ours, reference, mel),
        "short-window log-mel distance": log_mel_distance(ours, reference, _short_mel(rate)),
        "STFT distance": stft_distance(ours, reference),
        **periodicity(ours, reference, rate),
        "PESQ": pesq(ours, reference, rate),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def mean(each: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over those that have it."""
    values = {name: [one[name] for one in each if name in one] for name in NAMES}
    return {name: float(np.mean(some)) for name, some in values.items() if some}


def log_mel_distance(ours: Tensor, reference: Tensor, mel: Callable[[Tensor], Tensor]) -> float:
    """Mean absolute difference of log-mel frames: 1 is a factor e in a band's magnitude."""
    return float((mel(ours[None]) - mel(reference[None])).abs().mean())


@lru_cache(maxsize=2)
def _short_mel(rate: int) -> MelSpectrogram:
    """S3Gen's bands by windows of half the length: what is fitted to the frames that it was given, is not to these."""
    import torchaudio

    points = SHORT_WINDOW // 2 + 1
    highest = min(SHORT_HIGHEST, rate / 2)
    filters = torchaudio.functional.melscale_fbanks(points, 0.0, highest, SHORT_BANDS, rate, "slaney", "slaney")
    return MelSpectrogram(filters.T.numpy(), SHORT_WINDOW, SHORT_HOP)


def stft_distance(ours: Tensor, reference: Tensor) -> float:
    """Spectral convergence plus mean absolute difference of log magnitudes, averaged over three resolutions.

    As in Parallel WaveGAN (arXiv 1910.11480, equations 4 to 6).
    """
    total = 0.0
    for window, hop in RESOLUTIONS:
        a, b = (_magnitudes(samples, window, hop) for samples in (ours, reference))
        convergence = torch.linalg.norm(b - a) / torch.linalg.norm(b).clamp_min(FLOOR)
        total += float(convergence + (a.clamp_min(FLOOR).log() - b.clamp_min(FLOOR).log()).abs().mean())
    return total / len(RESOLUTIONS)


def _magnitudes(samples: Tensor, window: int, hop: int) -> Tensor:
    shape = torch.hann_window(window, device=samples.device)
    return torch.stft(samples, window, hop, window=shape, pad_mode="constant", return_complex=True).abs()


def periodicity(ours: Tensor, reference: Tensor, rate: int) -> dict[str, float]:
    """Root mean square error of periodicity, F1 of voicing decisions, and mean pitch error in cents where both are.

    As in CARGAN (arXiv 2110.10139), with the peak of the normalized autocorrelation in place of a neural pitch tracker.
    """
    (a, pitch_a, _), (b, pitch_b, loud) = (_periods(samples, rate) for samples in (ours, reference))
    if not loud.any():
        return {}
    voiced_a, voiced_b = (a > VOICED) & loud, (b > VOICED) & loud
    both = voiced_a & voiced_b
    found = {"periodicity error": float(np.sqrt(np.mean(np.square(a - b)[loud])))}
    if voiced_a.any() or voiced_b.any():
        found["voicing F1"] = float(2 * both.sum() / (voiced_a.sum() + voiced_b.sum()))
    if both.any():
        found["pitch error cents"] = float(np.mean(np.abs(1200 * np.log2(pitch_a[both] / pitch_b[both]))))
    return found


def _periods(samples: Tensor, rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Periodicity (0 to 1), pitch in Hz, and whether there is sound, of each frame (t,)."""
    low = soxr.resample(samples.detach().cpu().double().numpy(), rate, PITCH_RATE)
    low = np.pad(low, (0, max(0, PITCH_WINDOW - len(low))))
    frames = np.lib.stride_tricks.sliding_window_view(low, PITCH_WINDOW)[::PITCH_HOP]
    frames = frames - frames.mean(axis=1, keepdims=True)
    size = 2 * PITCH_WINDOW
    products = np.fft.irfft(np.abs(np.fft.rfft(frames, size)) ** 2, axis=1)[:, :PITCH_WINDOW]
    # each lag against the energy of the two stretches that overlap there
    energy = np.cumsum(np.square(frames), axis=1)
    lags = np.arange(int(PITCH_RATE / HIGHEST), int(PITCH_RATE / LOWEST) + 1)
    head, tail = energy[:, PITCH_WINDOW - 1 - lags], energy[:, -1:] - energy[:, lags - 1]
    normalized = products[:, lags] / np.sqrt(np.maximum(head * tail, 1e-12))
    # the shortest period that is nearly as good as the best: multiples of a period are periods too
    good = normalized >= 0.95 * normalized.max(axis=1, keepdims=True)
    first = good.argmax(axis=1)
    loud = np.sqrt(np.mean(np.square(frames), axis=1)) > LOUD
    return np.clip(normalized.max(axis=1), 0, 1), PITCH_RATE / lags[first], loud


def pesq(ours: Tensor, reference: Tensor, rate: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), 1 to 4.6; NaN where the package is missing or says nothing of these samples."""
    try:
        measure = import_module("pesq").pesq
    except ImportError:
        return math.nan
    a, b = (soxr.resample(x.detach().cpu().numpy(), rate, PESQ_RATE) for x in (ours, reference))
    try:
        return float(measure(PESQ_RATE, b, a, "wb"))
    except Exception:  # its errors say that there is no speech, or too little
        return math.nan
