"""What an utterance costs whose length has not been there before: speech tokens to samples, first and second time.

python benchmarks/new_lengths.py [FAMILY] [LENGTHS]; by default turbo 100,113,127,141

Upstream and the preset ``fast`` with HiFT's transposed convolutions whole, in pieces and (with channels last) by
products, each in a process of its own; all lengths once, then all again. Random weights and tokens, full-size.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings

WAYS: dict[str, dict[str, str]] = {
    "upstream": {},
    "whole": {"upsampling": "whole", "layout": "channels_first"},
    "pieces": {"upsampling": "pieces", "layout": "channels_first"},
    "products": {"upsampling": "pieces", "layout": "channels_last"},
}


def seconds(family: str, lengths: list[int], way: str) -> list[list[float]]:
    """Of each length, in two rounds."""
    import torch

    import chatterbox_turbo as turbo
    from chatterbox_turbo import synthetic

    model = synthetic.build(family, "full")
    if way != "upstream":
        turbo.apply(model, {"preset": "fast", "decoding": {"progress": "off"}, "vocoder": WAYS[way]})
    steps = {"n_cfm_timesteps": 2} if family == "turbo" else {}

    def once(length: int) -> float:
        tokens = torch.randint(0, 6561, (1, length), generator=torch.Generator().manual_seed(length))
        begun = time.perf_counter()
        with torch.inference_mode():
            model.s3gen.inference(speech_tokens=tokens, ref_dict=model.conds.gen, **steps)
        return time.perf_counter() - begun

    once(lengths[0] - 1)  # what is set up once, whatever the length
    return [[once(length) for length in lengths] for _ in range(2)]


def main(family: str = "turbo", lengths: str = "100,113,127,141", way: str = "") -> None:
    """Print a row for each way; with ``way`` that one, in this process."""
    numbers = [int(length) for length in lengths.split(",")]
    if way:
        rounds = seconds(family, numbers, way)
        print("|", way, "|", " | ".join(f"{a:.2f}, {b:.2f}" for a, b in zip(*rounds, strict=True)), "|", flush=True)
        return
    print("| tokens |", " | ".join(map(str, numbers)), "|\n|---|" + "---|" * len(numbers), flush=True)
    for each in WAYS:
        command = [sys.executable, "-W", "ignore", __file__, family, lengths, each]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
