"""Vocoders side by side: the mel frames of recordings turned back into samples, and how far those are from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..passes.watermark import detected
from ..runtime.s3gen.vocos_network import MelDescription, VocosNetwork
from ..runtime.s3gen.vocos_vocoder import VocosDecoder
from ..upstream.families import Parts
from ..upstream.speaker import speaker_vector
from ..upstream.stages import stages
from ..upstream.vocoder_weights import limit_of
from .distances import NAMES, distances, mean

RECORDING, HIFT, VOCOS, GRIFFIN_LIM = "recording", "HiFT", "Vocos", "Griffin-Lim"
ITERATIONS = 32  # of Griffin-Lim, as torchaudio and librosa have it
SIMILARITY, WATERMARK, SPEED = "speaker similarity", "watermark found", "seconds a second"
COLUMNS = (*NAMES, SIMILARITY, WATERMARK, SPEED)

Vocoder = Callable[[Tensor], Tensor]  # mel frames (1, bands, T) to samples (1, hop T)


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        figures: by row (``recording``, ``HiFT``, ``Vocos``, ``Griffin-Lim``), then by column (``COLUMNS``).
        heard: for each of the first recordings, marked samples (n,) by row; the recording's own are as they are.
        count, seconds: recordings, and how long they are together.
    """

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    heard: list[dict[str, np.ndarray]] = field(default_factory=list)
    count: int = 0
    seconds: float = 0.0


def vocoders(parts: Parts, network: VocosNetwork | None, mel: MelDescription) -> dict[str, Vocoder]:
    """HiFT as the model has it (optimized or not), a Vocos on its device, and Griffin-Lim, by name."""
    way = stages(parts)
    found: dict[str, Vocoder] = {HIFT: lambda frames: way.vocode(way.in_format(frames)).float()}
    if network is not None:
        found[VOCOS] = VocosDecoder(network.to(parts.device), limit_of(parts.s3gen.mel2wav)).synthesize
    found[GRIFFIN_LIM] = griffin_lim(mel, parts.device)
    return found


def griffin_lim(mel: MelDescription, device: torch.device) -> Vocoder:
    """Magnitudes by the pseudo-inverse of the mel filters, phases by Griffin and Lim's iteration; torchaudio's."""
    import torchaudio

    filters = torchaudio.functional.melscale_fbanks(
        mel.n_fft // 2 + 1, mel.fmin, mel.fmax, mel.bands, mel.sample_rate, mel.norm, mel.scale
    )
    inverse = torch.linalg.pinv(filters.T).to(device)
    window = torch.hann_window(mel.window, device=device)

    def synthesize(frames: Tensor) -> Tensor:
        magnitudes = (inverse @ frames.float().exp()).clamp_min(0)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # of the first phases
            samples = torchaudio.functional.griffinlim(
                magnitudes, window, mel.n_fft, mel.hop, mel.window, 1.0, ITERATIONS, 0.99, None, True
            )
        # its first frame is centred on sample 0, and the model's on the middle of the first hop
        half = mel.hop // 2
        samples = torch.nn.functional.pad(samples, (half, half))
        return samples[:, : frames.size(2) * mel.hop]

    return synthesize


@torch.inference_mode()
def evaluate(
    parts: Parts,
    recordings: Iterable[np.ndarray],
    rows: Mapping[str, Vocoder],
    mel: MelDescription,
    keep: int = 3,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Measure vocoders on recordings.

    Distances are of unmarked samples. PerTh's mark is then put on, as ``generate`` does, and looked for; on the
    recording itself nothing is put, so that its row shows what the detector finds where there is none. The first
    recording is synthesized once before any time is taken.

    Args:
        recordings: samples (n,) fp32 at the mel frames' rate, whole hops.
        rows: vocoders by name.
        keep: recordings whose samples are kept.
    """
    rate, way, result = mel.sample_rate, stages(parts), Evaluation()
    each: dict[str, list[dict[str, float]]] = {name: [] for name in (RECORDING, *rows)}
    spent = dict.fromkeys(rows, 0.0)
    for samples in recordings:
        reference = torch.from_numpy(samples).to(parts.device)
        frames = parts.s3gen.mel_extractor(reference[None])
        voice = speaker_vector(parts, samples, rate)
        heard = {RECORDING: samples}
        own = {SIMILARITY: 1.0, WATERMARK: float(_found(parts, samples, rate))}
        each[RECORDING].append(distances(reference, reference, rate, parts.s3gen.mel_extractor) | own)
        for name, vocoder in rows.items():
            if not result.count:
                vocoder(frames)
            made, seconds = _timed(vocoder, frames, parts.device)
            spent[name] += seconds
            made = made[0, : len(samples)].clamp(-1, 1)
            found = distances(made, reference[: len(made)], rate, parts.s3gen.mel_extractor)
            signal = made.cpu().numpy()
            marked = way.watermark(signal)
            found[SIMILARITY] = float(speaker_vector(parts, signal, rate) @ voice)
            found[WATERMARK] = float(_found(parts, marked, rate))
            each[name].append(found)
            heard[name] = np.asarray(marked, dtype=np.float32)
        result.heard += [heard] if len(result.heard) < keep else []
        result.count, result.seconds = result.count + 1, result.seconds + len(samples) / rate
        progress(result.count)
    for name, found in each.items():
        figures: dict[str, Any] = mean(found)
        figures |= {column: float(np.mean([one[column] for one in found])) for column in (SIMILARITY, WATERMARK)}
        if name in spent:
            figures[SPEED] = result.seconds / spent[name]
        result.figures[name] = figures
    return result


def _timed(vocoder: Vocoder, frames: Tensor, device: torch.device) -> tuple[Tensor, float]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began = time.perf_counter()
    made = vocoder(frames)
    wait()
    return made, time.perf_counter() - began


def _found(parts: Parts, samples: np.ndarray, rate: int) -> bool:
    return detected(parts.watermarker, torch.from_numpy(np.asarray(samples, dtype=np.float32))[None], rate)
