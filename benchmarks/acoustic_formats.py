"""What half precision of each part of the acoustic half saves, and what it does to mel frames and samples.

python benchmarks/acoustic_formats.py [FAMILY] [TOKENS] [ROUNDS]

Full-size models with random weights. Formats take turns. Mel frames are compared with those of fp32 throughout, samples
with those that the vocoder in fp32 makes of the same frames.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.stages import stages

FORMATS = {
    "fp32": (),
    "estimator": ("flow",),
    "encoder": ("encoder",),
    "vocoder": ("vocoder",),
    "estimator and encoder": ("flow", "encoder"),
    "all three": ("flow", "encoder", "vocoder"),
}


def main(family: str = "turbo", tokens: str = "150", rounds: str = "5") -> None:
    """Print milliseconds of flow matching and vocoder, and distances, by what is in half precision."""
    model = synthetic.build(family, "full")
    speech = torch.randint(0, 6000, (int(tokens),), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMATS}
    mels, samples = {}, {}
    for number in range(int(rounds) + 1):
        for name, halved in FORMATS.items():
            config = {"fidelity": "lossy", "precision": dict.fromkeys(halved, "auto"), "decoding": {"progress": "off"}}
            with turbo.optimized(model, config), torch.inference_mode():
                parts = identify(model)
                own = stages(parts)
                torch.manual_seed(0)
                start = time.perf_counter()
                mel = own.frames(speech, own.voice_reference(parts.voice)).clone()
                middle = time.perf_counter()
                mels[name] = mel
                torch.manual_seed(0)
                vocoded = time.perf_counter()
                samples[name] = own.vocode(mels["fp32"]).clone()
                end = time.perf_counter()
            if number:  # the first one warms up
                times[name].append((middle - start, end - vocoded))
    for name, measured in times.items():
        columns = []
        for seconds in zip(*measured, strict=True):
            some = sorted(1e3 * one for one in seconds)
            columns.append(f"{statistics.median(some):.0f} ms ({some[0]:.0f} to {some[-1]:.0f})")
        print(
            f"{name:<22} flow {columns[0]}, vocoder {columns[1]}; mel {snr_db(mels[name], mels['fp32']):.1f} dB, "
            f"samples {snr_db(samples[name], samples['fp32']):.1f} dB",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
