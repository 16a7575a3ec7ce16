"""HiFT with channels last against upstream's layout: seconds, and how far the samples are apart.

python benchmarks/vocoder_layout.py [FAMILY] [TOKENS] [ROUNDS]

Full-size vocoder with random weights, under ``auto`` (fp32) and ``fast`` (its residual blocks in the half-precision
format that the machine is good at, if any). Layouts take turns, over the same mel frames and random numbers.
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

LAYOUTS = ("channels_first", "channels_last")


def main(family: str = "turbo", tokens: str = "150", rounds: str = "5") -> None:
    """Print a line for each preset and layout."""
    model = synthetic.build(family, "full")
    mel = torch.randn(1, 80, 2 * int(tokens), generator=torch.Generator().manual_seed(0))
    for preset in ("auto", "fast"):
        times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        samples = {}
        for number in range(int(rounds) + 1):
            for layout in LAYOUTS:
                config = {"preset": preset, "vocoder": {"layout": layout}, "decoding": {"progress": "off"}}
                with turbo.optimized(model, config), torch.inference_mode():
                    own = stages(identify(model))
                    for _ in range(2):  # the first one warms up
                        torch.manual_seed(0)
                        start = time.perf_counter()
                        samples[layout] = own.vocode(mel).clone()
                        seconds = time.perf_counter() - start
                if number:
                    times[layout].append(seconds)
        for layout, each in times.items():
            print(
                f"{preset:<5} {layout:<15} {statistics.median(each):.3f} s ({min(each):.3f} to {max(each):.3f})",
                flush=True,
            )
        print(f"      apart {snr_db(samples['channels_last'], samples['channels_first']):.1f} dB", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
