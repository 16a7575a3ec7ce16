"""A full-size Vocos with random weights against HiFT of the full size: time, weights, peak memory, windows of a stream.

Run: OMP_NUM_THREADS=2 python benchmarks/vocos_vocoder.py [time|memory|stream] [SECONDS] [ROUNDS]. Sides in turns; the
memory of each side is that of a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from chatterbox_turbo.config import VocoderSection
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.measure.streaming import given
from chatterbox_turbo.passes.vocoder import Vocoder
from chatterbox_turbo.passes.vocos import VocosVocoder
from chatterbox_turbo.runtime.cpu import process_memory
from chatterbox_turbo.runtime.memory.clearing import CachePolicy
from chatterbox_turbo.runtime.s3gen.streaming import AcousticStream, Windows
from chatterbox_turbo.runtime.s3gen.vocos_network import MelDescription, VocosArchitecture, VocosNetwork, build
from chatterbox_turbo.runtime.s3gen.vocos_vocoder import StreamedVocos, VocosDecoder

FRAMES = 50  # a second
SIDES = ("upstream's HiFT", "HiFT of this package", "Vocos")
MEL = MelDescription(24000, 80, 480, 1920, 1920, 0.0, 8000.0)
LIMIT = 0.99


def hift() -> torch.nn.Module:
    """Upstream's vocoder as S3Gen builds it, with random weights."""
    from chatterbox.models.s3gen.f0_predictor import ConvRNNF0Predictor
    from chatterbox.models.s3gen.hifigan import HiFTGenerator

    torch.manual_seed(0)
    return HiFTGenerator(
        sampling_rate=24000,
        upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7],
        source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5]] * 3,
        f0_predictor=ConvRNNF0Predictor(),
    ).eval()


def vocos() -> VocosNetwork:
    """The full size, with the package's initial values."""
    torch.manual_seed(0)
    return build(VocosArchitecture(), MEL).eval().requires_grad_(False)


def vocoder(side: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """Mel frames (1, 80, T) to samples by a side, and the bytes of its weights."""
    module = vocos() if side == "Vocos" else hift()
    weights = sum(p.nbytes for p in module.parameters())
    if side == "upstream's HiFT":
        return lambda mel: module.inference(speech_feat=mel)[0], weights
    section = VocoderSection()
    if side == "Vocos":
        engine = VocosVocoder(module, LIMIT, section, CachePolicy())
    else:
        engine = Vocoder(module, section, "exact", CachePolicy())
    engine.prepare()
    return lambda mel: engine.speak(mel)[0], weights


def mel_of(seconds: float) -> torch.Tensor:
    """Mel frames (1, 80, T), normal numbers."""
    return torch.randn(1, 80, round(FRAMES * seconds), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def times(seconds: float, rounds: int) -> None:
    """Seconds of each side, and their ratio to Vocos round by round."""
    sides = {side: vocoder(side)[0] for side in SIDES}
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    mel = mel_of(seconds)
    for run in sides.values():
        run(mel)
    for number in range(rounds):
        for side in SIDES if number % 2 else SIDES[::-1]:
            start = time.perf_counter()
            sides[side](mel)
            taken[side].append(time.perf_counter() - start)
    print(f"{seconds:g} s of speech, {torch.get_num_threads()} threads, {rounds} rounds: median (min to max), to Vocos")
    for side, each in taken.items():
        ratio = statistics.median(a / b for a, b in zip(each, taken["Vocos"], strict=True))
        span = f"{statistics.median(each):.3f} s ({min(each):.3f} to {max(each):.3f})"
        print(f"| {side} | {span} | {ratio:.1f}x, least to least {min(each) / min(taken['Vocos']):.1f}x |", flush=True)


def memory(seconds: float, rounds: int) -> None:
    """Weights and peak of each side."""
    print("| | weights, MiB | most above what was there before, MiB |")
    for side in SIDES:
        command = [sys.executable, __file__, "side", str(seconds), side]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(), flush=True)


@torch.inference_mode()
def one_side(seconds: float, name: str) -> None:
    """One side in this process."""
    run, weights = vocoder(name)
    mel = mel_of(seconds)
    before = process_memory.resident().now
    process_memory.reset_peak()
    run(mel)
    peak = process_memory.resident().peak - before
    print(f"| {name} | {weights / 2**20:.1f} | {peak / 2**20:.0f} |")


def stream(seconds: float, rounds: int) -> None:
    """Samples of a stream to those of the whole, by frames held back; initial weights, and some whose blocks count."""
    mel = mel_of(seconds)
    tokens = torch.zeros(mel.size(2) // 2, dtype=torch.int64)
    for name, strengthen in (("initial weights", False), ("weights of unit gain", True)):
        network = vocos()
        if strengthen:
            unit_gain(network)
        decoder = VocosDecoder(network, LIMIT)
        with torch.inference_mode():
            whole = decoder.synthesize(mel)[0]
            for held in (0, 4, 8, 12, 16, 20, 24, 29):
                windows = Windows(25, 25, growth=1, held=held, faded=min(4, held))
                made = AcousticStream(
                    lambda _, first, noise: noise, StreamedVocos(lambda d=decoder: d), given(mel), windows,
                    reach=network.architecture.reach,
                )  # fmt: skip
                samples = torch.cat(list(made.run(tokens.split(25))))
                print(f"| {name} | {held} | {snr_db(samples, whole):.0f} dB |", flush=True)


def unit_gain(network: VocosNetwork) -> None:
    """Weights with which layers keep the size of what they are given, and blocks add as much."""
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
        elif name.endswith("gamma"):
            weight.fill_(1.0)
    network.head.out.bias[: network.architecture.n_fft // 2 + 1] -= 3


def main(part: str = "time", seconds: str = "8", last: str = "5") -> None:
    """Print one part's table."""
    if part == "side":
        one_side(float(seconds), last)
    else:
        {"time": times, "memory": memory, "stream": stream}[part](float(seconds), int(last))


if __name__ == "__main__":
    main(*sys.argv[1:])
