"""Is another kernel of attention faster on this CPU than the package's own choice? Full sizes, in turns.

python benchmarks/attention.py [prefill|encoder|flow] [float32|bfloat16] [LENGTH] [ROUNDS]

``prefill``: LENGTH positions through three layers of T3, two rows; ``encoder``: LENGTH speech tokens; ``flow``: one
guided step over LENGTH frames, the one part whose attention follows the format of the weights on a CPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.device.attention_kernels import Kernel, Wanted, kernel_for
from chatterbox_turbo.runtime.s3gen.flow_estimator import constant, velocity
from chatterbox_turbo.runtime.s3gen.scratch import Scratch
from chatterbox_turbo.runtime.s3gen.speech_encoder import SpeechEncoder
from chatterbox_turbo.runtime.t3.kv_cache import KVCache
from chatterbox_turbo.runtime.t3.transformer import prefill
from chatterbox_turbo.upstream import encoder_weights, flow_weights, t3_weights

CPU = torch.device("cpu")
CHOICES = (None, Wanted("sdpa", "flash"), Wanted("sdpa", "math"), Wanted("eager"))


def prefilling(dtype: str, length: int) -> Callable[[Kernel | None], Tensor]:
    model = synthetic.build("english", synthetic.SHALLOW)
    turbo.apply(model, {"decoding": {"backbone": "static", "kernel": "torch", "huge_pages": False}})
    weights, embeds = t3_weights.read(model.t3), torch.randn(2, length, 1024)

    def run(kernel: Kernel | None) -> Tensor:
        cache = KVCache(len(weights.layers), weights.heads, weights.head_width, torch.float32, CPU)
        cache.begin(2)
        cache.ensure(length)
        return prefill(weights, cache, embeds, kernel=kernel)

    return run


def encoding(dtype: str, length: int) -> Callable[[Kernel | None], Tensor]:
    model = synthetic.build("vc", "full")
    turbo.apply(model, {"flow": {"enabled": True}})
    weights, x, made = encoder_weights.read(model.s3gen), torch.randn(1, length, 512), {}

    def run(kernel: Kernel | None) -> Tensor:
        key = kernel and kernel.name
        if key not in made:
            made[key] = SpeechEncoder(weights, kernel)
        return made[key](x, [length])

    return run


def flowing(dtype: str, length: int) -> Callable[[Kernel | None], Tensor]:
    model = synthetic.build("vc", "full")
    turbo.apply(model, {"fidelity": "lossy", "flow": {"enabled": True}, "precision": {"flow": dtype}})
    weights, scratch = flow_weights.read(model.s3gen), Scratch()
    state, mean = torch.randn(1, length, 80), torch.randn(2, length, 80)
    times = flow_weights.time_projections(model.s3gen, torch.tensor([0.0, 0.1]))[0]
    start = constant(weights, mean, torch.randn(2, 80), mean)
    return lambda kernel: velocity(weights, state, start, times, None, scratch, kernel)


@torch.inference_mode()
def main(part: str = "prefill", dtype: str = "float32", length: str = "100", rounds: str = "5") -> None:
    with torch.inference_mode(False), torch.no_grad():
        run = {"prefill": prefilling, "encoder": encoding, "flow": flowing}[part](dtype, int(length))
    kernels = {str(wanted or "auto"): wanted and kernel_for(wanted, CPU) for wanted in CHOICES}
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    results: dict[str, Tensor] = {}
    for number in range(int(rounds) + 1):  # the first one warms up
        for name in sorted(kernels, key=list(kernels).index, reverse=bool(number % 2)):
            start = time.perf_counter()
            results[name] = run(kernels[name])
            if number:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["auto"])
    print(f"{part}, {dtype}, {length} positions, {torch.get_num_threads()} threads: milliseconds")
    for name, taken in seconds.items():
        span = f"{1e3 * statistics.median(taken):.1f} ({1e3 * min(taken):.1f} to {1e3 * max(taken):.1f})"
        closeness = f"{snr_db(results[name].float(), results['auto'].float()):.0f} dB"
        print(f"| {name} | {span} | {base / statistics.median(taken):.2f}x | {closeness} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
