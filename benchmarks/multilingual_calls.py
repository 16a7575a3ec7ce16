"""Hooks and milliseconds a token over many calls of one multilingual model, upstream and optimized in turn.

Run: python benchmarks/multilingual_calls.py [calls]. Two tiny synthetic models of the same weights (14 layers), each
call of T3 alone with the same seed, interleaved so that both see the same machine.
"""

import statistics
import sys
import time
import warnings

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.upstream.alignment import analyzer_hooks

CALLS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
TEXT = torch.tensor([[255, *range(10, 40), 0]]).repeat(2, 1)


def call(model, seed):
    """Milliseconds a token of one generation, and its ids."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    tokens = model.t3.inference(t3_cond=model.conds.t3, text_tokens=TEXT, max_new_tokens=16)
    return (time.perf_counter() - start) * 1000 / tokens.size(1), tokens


def main():
    """Print a row for each tenth of the calls."""
    warnings.simplefilter("ignore")
    upstream, ours = (synthetic.build("multilingual", "tiny") for _ in range(2))
    turbo.apply(ours, {"preset": "exact", "decoding": {"progress": "off"}})
    times, tenth = {"upstream": [], "optimized": []}, max(1, CALLS // 10)
    equal = 0
    print("calls      hooks                  ms/token (median)         tokens")
    print("           upstream  optimized    upstream  optimized       equal")
    for number in range(CALLS):
        a, theirs = call(upstream, number)
        b, mine = call(ours, number)
        times["upstream"].append(a)
        times["optimized"].append(b)
        equal += torch.equal(theirs, mine)
        if (number + 1) % tenth == 0:
            medians = [statistics.median(values[-tenth:]) for values in times.values()]
            hooks = [len(analyzer_hooks(model.t3.tfmr)) for model in (upstream, ours)]
            print(
                f"{number + 1:>5}      {hooks[0]:>8}  {hooks[1]:>9}    {medians[0]:>8.1f}  {medians[1]:>9.1f}", end=""
            )
            print(f"       {equal}/{number + 1}", flush=True)


if __name__ == "__main__":
    main()
