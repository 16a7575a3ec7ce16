"""Hooks and milliseconds a token over many calls of one multilingual model, upstream and optimized in turn.

Run: python benchmarks/multilingual_calls.py [calls ...]. Two tiny synthetic models of the same weights (14 layers).
Short calls of T3 make up the number; then longer ones measure a token, interleaved so that both see the same machine.
The optimized side runs the exact preset, which keeps upstream's backbone: what differs is what calls leave behind.
"""

import statistics
import sys
import time
import warnings

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.upstream.alignment import analyzer_hooks

CALLS = [int(number) for number in sys.argv[1:]] or [0, 100, 200, 400]
TEXT = torch.tensor([[255, *range(10, 40), 0]]).repeat(2, 1)
SHORT, LONG, PAIRS = 2, 20, 9


def call(model, seed, tokens):
    """Milliseconds a token of one generation, and its ids."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = model.t3.inference(t3_cond=model.conds.t3, text_tokens=TEXT, max_new_tokens=tokens)
    return (time.perf_counter() - start) * 1000 / ids.size(1), ids


def main():
    """Print a row for each number of calls."""
    warnings.simplefilter("ignore")
    models = [synthetic.build("multilingual", "tiny") for _ in range(2)]
    turbo.apply(models[1], {"preset": "exact", "decoding": {"progress": "off"}})
    made, equal = 0, 0
    for model in models:
        call(model, 0, LONG)  # warm-up
    print("calls before   hooks                  ms/token, median (min to max)")
    print("               upstream  optimized    upstream              optimized             ratio")
    for wanted in CALLS:
        while made < wanted:
            results = [call(model, made, SHORT)[1] for model in models]
            made, equal = made + 1, equal + torch.equal(*results)
        hooks = [len(analyzer_hooks(model.t3.tfmr)) for model in models]
        pairs = []
        for number in range(PAIRS):
            order = models if number % 2 else models[::-1]
            pair = {id(model): call(model, number, LONG)[0] for model in order}
            pairs.append([pair[id(model)] for model in models])
        made += PAIRS
        shown = [
            f"{statistics.median(values):5.1f} ({min(values):.1f} to {max(values):.1f})"
            for values in zip(*pairs, strict=True)
        ]
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{wanted:>12}   {hooks[0]:>8}  {hooks[1]:>9}    {shown[0]:<20}  {shown[1]:<20}  {ratio:.2f}", flush=True)
    print(f"tokens of the short calls: {equal} of {made - PAIRS * len(CALLS)} equal")


if __name__ == "__main__":
    main()
