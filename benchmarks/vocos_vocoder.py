"""A full-size Vocos with random weights against HiFT of the full size: time, weights, peak memory, windows of a stream.

Run: OMP_NUM_THREADS=2 python benchmarks/vocos_vocoder.py [time|memory|stream] [SECONDS] [ROUNDS]. Sides in turns; the
memory of each side is that of a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.measure.streaming import given
from chatterbox_turbo.runtime.cpu import process_memory
from chatterbox_turbo.runtime.s3gen.streaming import AcousticStream, Windows
from chatterbox_turbo.runtime.s3gen.vocos_checkpoint import write
from chatterbox_turbo.runtime.s3gen.vocos_network import VocosArchitecture, VocosNetwork, build
from chatterbox_turbo.runtime.s3gen.vocos_vocoder import StreamedVocos, VocosDecoder
from chatterbox_turbo.upstream import mel_frames

FRAMES = 50  # a second
NOTHING = {name: {"enabled": False} for name, _ in turbo.OptimizationConfig().sections()}
SIDES = ("upstream's HiFT", "HiFT of this package", "Vocos")


def config_of(side: str, folder: str) -> dict:
    """Nothing but the vocoder of a side."""
    if side == SIDES[0]:
        return NOTHING
    vocos = {"kind": "vocos", "checkpoint": folder} if side == SIDES[2] else {}
    return {**NOTHING, "fidelity": "lossy", "vocoder": {"enabled": True, **vocos}}


def network_for(s3gen: torch.nn.Module) -> VocosNetwork:
    """The full size, with the package's initial values."""
    torch.manual_seed(0)
    return build(VocosArchitecture(), mel_frames.describe(s3gen)).eval()


def mel_of(seconds: float) -> torch.Tensor:
    """Mel frames (1, 80, T), normal numbers."""
    return torch.randn(1, 80, round(FRAMES * seconds), generator=torch.Generator().manual_seed(0))


def vocoding(model, mel: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What is timed."""

    @torch.inference_mode()
    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return model.s3gen.mel2wav.inference(speech_feat=mel)[0]

    return run


def times(seconds: float, rounds: int) -> None:
    """Seconds of each side, and their ratio to Vocos round by round."""
    model = synthetic.build("vc", "full")
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "vocoder", network_for(model.s3gen))
        run = vocoding(model, mel_of(seconds))
        for number in range(rounds):
            for side in SIDES if number % 2 else SIDES[::-1]:
                with turbo.optimized(model, config_of(side, f"{folder}/vocoder")):
                    run()  # a warm-up
                    start = time.perf_counter()
                    run()
                    taken[side].append(time.perf_counter() - start)
    print(f"{seconds:g} s of speech, {torch.get_num_threads()} threads, {rounds} rounds: median (min to max), to Vocos")
    for side, each in taken.items():
        ratio = statistics.median(a / b for a, b in zip(each, taken["Vocos"], strict=True))
        span = f"{statistics.median(each):.3f} s ({min(each):.3f} to {max(each):.3f})"
        print(f"| {side} | {span} | {ratio:.1f}x |", flush=True)


def memory(seconds: float, rounds: int) -> None:
    """Weights and peak of each side."""
    print("| | weights, MiB | most above what was there before, MiB |")
    for side in SIDES:
        command = [sys.executable, __file__, "side", str(seconds), side]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(), flush=True)


def side(seconds: float, name: str) -> None:
    """One side in this process; the peak includes weights that come back from a file while they are read."""
    model = synthetic.build("vc", "full")
    with tempfile.TemporaryDirectory() as folder:
        network = network_for(model.s3gen)
        write(Path(folder) / "vocoder", network)
        own = network if name == "Vocos" else model.s3gen.mel2wav
        weights = sum(p.nbytes for p in own.parameters())
        del network
        with turbo.optimized(model, config_of(name, f"{folder}/vocoder")):
            run = vocoding(model, mel_of(seconds))
            before = process_memory.resident().now
            process_memory.reset_peak()
            run()
            peak = process_memory.resident().peak - before
    print(f"| {name} | {weights / 2**20:.1f} | {peak / 2**20:.0f} |")


def stream(seconds: float, rounds: int) -> None:
    """Samples of a stream to those of the whole, by frames held back; initial weights, and some whose blocks count."""
    model = synthetic.build("vc", "tiny")
    mel = mel_of(seconds)
    tokens = torch.zeros(mel.size(2) // 2, dtype=torch.int64)
    for name, strengthen in (("initial weights", False), ("weights of unit gain", True)):
        network = network_for(model.s3gen).requires_grad_(False)
        if strengthen:
            unit_gain(network)
        decoder = VocosDecoder(network, 0.99)
        with torch.inference_mode():
            whole = decoder.synthesize(mel)[0]
            for held in (0, 4, 8, 12, 16, 20, 24, 29):
                windows = Windows(held=held, faded=min(4, held))
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
        side(float(seconds), last)
    else:
        {"time": times, "memory": memory, "stream": stream}[part](float(seconds), int(last))


if __name__ == "__main__":
    main(*sys.argv[1:])
