"""How soon a stream is heard and whether it keeps up: first audio, real-time factor, the least lead of a player.

python benchmarks/first_audio.py [FAMILY] [PRESET] [TOKENS] [RUNS] [SIZE] [PROMPT_SECONDS]

Random weights; ``generate`` of the same text beside each stream. After a warm-up with the stream's own windows.
PROMPT_SECONDS: ``flow.prompt_seconds``, how much of the voice's recording flow matching is given; the whole by default.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.upstream.families import identify

TEXT = "The tide went out before noon, and nobody had asked the captain whether it would come back."


def streamed(model, request) -> dict[str, float]:
    """Figures of one stream, in seconds; ``lead`` is the least that a player had left when a block came."""
    blocks = [(samples.size(1) / model.sr, metrics) for samples, metrics in model.turbo.stream(**request, seed=0)]
    last = blocks[-1][1]
    return {
        "first audio": last.first_audio,
        "first block": blocks[0][0],
        "whole": last.elapsed,
        "seconds of speech": last.seconds,
        "real-time factor": last.real_time_factor,
        "least lead": min((metrics.lead for _, metrics in blocks[1:]), default=0.0),
        "blocks": len(blocks),
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
    prompt: str | None = None,
) -> None:
    """Print median, least and most of each figure."""
    model = synthetic.build(family, size, stop_after=int(tokens))
    config = {"preset": preset, "decoding": {"progress": "off"}}
    if prompt is not None:
        config |= {"fidelity": "lossy", "flow": {"prompt_seconds": float(prompt)}}
    turbo.apply(model, config)
    request = arguments(identify(model), TEXT)
    streamed(model, request)
    figures: dict[str, list[float]] = {}
    for _ in range(int(runs)):
        found = {**streamed(model, request), "generate": called(model, request)}
        for name, value in found.items():
            figures.setdefault(name, []).append(value)
    for name, values in figures.items():
        print(f"{name:<18}{statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f})", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
