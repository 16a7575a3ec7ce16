"""T3's decode step on full-size synthetic weights: its error against upstream's backbone, its speed, batches, bf16.

Run: python benchmarks/token_step.py [english|multilingual|turbo] [steps]. One model; every implementation decodes the
same tokens after the same prefix, in turns, so that all see the same machine. Then a step by the rows of its batch.
"""

import statistics
import sys
import time
import warnings

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.benchmark import read_bandwidth, t3_bytes
from chatterbox_turbo.measure.divergence import compare_logits
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.runtime.t3.step_choice import make_step
from chatterbox_turbo.upstream import t3_weights
from chatterbox_turbo.upstream.families import identify

FAMILY = sys.argv[1] if len(sys.argv) > 1 else "english"
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 20
TEXT = "A sentence of the length that a person says in one breath."
ROUNDS = 2
CONFIGS = {
    "upstream's backbone": {"backbone": "upstream"},
    "torch, fp32": {"kernel": "torch"},
    "numba, fp32": {"kernel": "numba"},
    "torch, bf16": {"kernel": "torch"},
    "numba, bf16": {"kernel": "numba"},
}


def config(name):
    """What ``apply`` gets for a row of the table."""
    half = {"precision": {"t3": "bfloat16", "enabled": True}} if "bf16" in name else {}
    return {"fidelity": "lossy", "decoding": {"progress": "off", **CONFIGS[name]}, **half}


def capture(model):
    """The request of T3 for the text, as ``generate`` makes it, and the logits and seconds of its steps."""

    class Done(BaseException):
        pass

    engine, found = model.turbo.token_model, []

    def handler(*args, **kwargs):
        request = engine.request(*args, **kwargs)
        start = time.perf_counter()
        engine.logits(request, [7])  # the prefill alone
        prefill = time.perf_counter() - start
        tokens = torch.randint(0, 6000, (STEPS,), generator=torch.Generator().manual_seed(1)).tolist()
        start = time.perf_counter()
        logits = engine.logits(request, tokens)
        found.extend([logits, (time.perf_counter() - start - prefill) / (STEPS - 1)])
        raise Done

    try:
        with engine.calls.diverted(handler):
            model.generate(**arguments(identify(model), TEXT))
    except Done:
        return found


def rows_table(model, weights_format):
    """Milliseconds of a step by rows, for both implementations, with caches of 200 positions."""
    from chatterbox_turbo.runtime.t3.kv_cache import KVCache

    weights = t3_weights.read(model.t3)
    steps = {name: make_step(name, weights) for name in ("torch", "numba")}
    print(
        f"\n{weights_format}\n{'rows':>6}  "
        + "  ".join(f"{name + ', ms a step':>18}" for name in steps)
        + "   tokens/s of the faster"
    )
    for rows in (1, 2, 4, 8, 16):
        caches = {}
        for name, step in steps.items():
            cache = KVCache(len(weights.layers), weights.heads, weights.head_width, step.cache_dtype, weights.device)
            cache.begin(rows)
            cache.ensure(256)
            cache.append(rows, 200)
            caches[name] = cache
        embeds, times = torch.zeros(rows, weights.width), {name: [] for name in steps}
        with torch.inference_mode():
            for _ in range(4):
                for name, step in steps.items():
                    start = time.perf_counter()
                    step(caches[name], embeds)
                    times[name].append(time.perf_counter() - start)
        medians = [statistics.median(values[1:]) for values in times.values()]
        per_request = rows / (1 if FAMILY == "turbo" else 2)
        print(f"{rows:>6}  " + "  ".join(f"{1e3 * m:>18.1f}" for m in medians) + f"   {per_request / min(medians):.1f}")


def main():
    """Print both tables."""
    warnings.simplefilter("ignore")
    model = synthetic.build(FAMILY, "full")
    logits, times, floors = {}, {name: [] for name in CONFIGS}, {name: [] for name in CONFIGS}
    for _ in range(ROUNDS):
        for name in CONFIGS:
            with turbo.optimized(model, config(name)):
                speed = read_bandwidth(torch.device("cpu"))
                logits[name], seconds = capture(model)
                times[name].append(seconds)
                floors[name].append(t3_bytes(identify(model)) / speed / seconds)
    reference = logits["upstream's backbone"]
    print(f"{FAMILY}, {STEPS} steps, {ROUNDS} rounds: median (min to max)")
    for name, values in times.items():
        upstream = statistics.median(a / b for a, b in zip(times["upstream's backbone"], values, strict=True))
        error = ((logits[name] - reference).abs().max() / reference.abs().max()).item()
        print(
            f"{name:>20}: {1e3 * statistics.median(values):6.1f} ms/token ({1e3 * min(values):.1f} to "
            f"{1e3 * max(values):.1f}), {upstream:.2f}x, {statistics.median(floors[name]):.0%} of the bandwidth, "
            f"error {error:.1e}; {compare_logits(logits[name], reference)}"
        )
    for name in ("numba, fp32", "numba, bf16"):
        with turbo.optimized(model, config(name)):
            rows_table(model, name[-4:])


if __name__ == "__main__":
    main()
