"""How soon a stream is heard and whether it keeps up: first audio, real-time factor, the least lead of a player.

python benchmarks/first_audio.py [FAMILY] [PRESET] [TOKENS] [RUNS] [SIZE] [PROMPT_SECONDS] [WINDOWS ...]

Random weights; ``generate`` of the same text beside each stream. After a warm-up with the stream's own windows.
PROMPT_SECONDS: ``flow.prompt_seconds``, how much of the voice's recording flow matching is given; 0: the whole.
WINDOWS: numbers of ``Windows`` as FIRST_CHUNK,CHUNK,GROWTH,LONGEST_CHUNK,EVEN; several take turns. Of the last run
also what each block took. ``CHATTERBOX_TURBO__SECTION__KEY=value`` sets single options.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from typing import Any

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.config import OptimizationConfig
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.runtime.s3gen.streaming import Windows
from chatterbox_turbo.upstream.families import identify

TEXT = "The tide went out before noon, and nobody had asked the captain whether it would come back."


def streamed(model, request, windows: Windows) -> dict[str, Any]:
    """Figures of one stream, in seconds; ``furthest behind``: what a player has waited for at most, in all."""
    stream = model.turbo.stream(**request, seed=0, windows=windows)
    blocks = [(samples.size(1) / model.sr, metrics) for samples, metrics in stream]
    begins, last = [0.0, *(metrics.elapsed for _, metrics in blocks[:-1])], blocks[-1][1]
    return {
        "blocks": [(one.elapsed - begin, seconds) for begin, (seconds, one) in zip(begins, blocks, strict=True)],
        "first audio": last.first_audio,
        "first block": blocks[0][0],
        "whole": last.elapsed,
        "seconds of speech": last.seconds,
        "real-time factor": last.real_time_factor,
        "furthest behind": -min((metrics.lead for _, metrics in blocks[1:]), default=0.0),
    }


def called(model, request) -> float:
    """Seconds of ``generate``."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model.generate(**request)
    return time.perf_counter() - start


def main(
    family: str = "turbo",
    preset: str = "fast",
    tokens: str = "150",
    runs: str = "3",
    size: str = "full",
    prompt: str = "0",
    *windows: str,
) -> None:
    """Print median, least and most of each figure."""
    model = synthetic.build(family, size, stop_after=int(tokens))
    config = {"preset": preset, "decoding": {"progress": "off"}}
    if float(prompt):
        config |= {"fidelity": "lossy", "flow": {"prompt_seconds": float(prompt)}}
    turbo.apply(model, OptimizationConfig.from_values(config, "the benchmark", environment=True))
    request = arguments(identify(model), TEXT)
    every = {name: windows_of(name) for name in windows} or {"": Windows()}
    for chosen in every.values():
        streamed(model, request, chosen)
    figures: dict[str, dict[str, list[Any]]] = {name: {} for name in every}
    for _ in range(int(runs)):
        whole = called(model, request)
        for name, chosen in every.items():
            for figure, value in {**streamed(model, request, chosen), "generate": whole}.items():
                figures[name].setdefault(figure, []).append(value)
    for name, found in figures.items():
        print(name or Windows(), flush=True)
        blocks = found.pop("blocks")[-1]
        for figure, values in found.items():
            print(f"{figure:<18}{statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f})", flush=True)
        print("blocks:", ", ".join(f"{took:.2f} s for {seconds:.2f}" for took, seconds in blocks), flush=True)


def windows_of(numbers: str) -> Windows:
    """FIRST_CHUNK,CHUNK,GROWTH,LONGEST_CHUNK,EVEN."""
    first, chunk, growth, longest, even = numbers.split(",")
    return Windows(int(first), int(chunk), float(growth), int(longest), int(even))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
