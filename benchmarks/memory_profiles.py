"""What each profile of the memory pass keeps between requests, and what that costs.

    python benchmarks/memory_profiles.py [--family turbo] [--size full] [--tokens 101] [--requests 2] [--profiles ...]

Builds a synthetic model, speaks under each profile in turn, and prints resident memory after the requests and at the
highest (exact peaks), seconds a request, and the heap's share that is free. What one profile leaves is there for the
next: ``--profiles`` with one of them, in a process of its own, is fairer. ``balanced`` is ``conservative`` where memory
is not short.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.upstream.families import identify

MIB = 2**20


def main() -> None:
    """Print a line a profile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="turbo")
    parser.add_argument("--size", default="full")
    parser.add_argument("--tokens", type=int, default=101)
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--profiles", nargs="+", default=["conservative", "aggressive"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    model = synthetic.build(options.family, options.size, stop_after=options.tokens)
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
    request = arguments(identify(model), "The quick brown fox.", audio=str(synthetic.reference_voice()))

    def speak() -> float:
        torch.manual_seed(0)
        start = time.perf_counter()
        model.generate(**request)
        return time.perf_counter() - start

    quiet = {"decoding": {"progress": "off"}}
    for profile in options.profiles:
        turbo.apply(model, {**quiet, "memory": {"profile": profile, "peaks": True}})
        print(f"applied after {time.perf_counter() - start:.0f} s", flush=True)
        seconds = [speak() for _ in range(options.requests)]
        found = model.turbo.memory()
        cleared = found["clearings"]
        print(
            f"{profile}: resident {found['process']['now'] / MIB:.0f} MiB after the requests, "
            f"{max(found['peaks'].values()) / MIB:.0f} at most; {min(seconds):.2f} s a request; "
            f"heap {found['fragmentation'].get('heap', 0) / MIB:.0f} MiB, "
            f"{found['fragmentation'].get('fragmentation', 0):.0%} of it free"
        )
        for place in ("before the vocoder", "between requests"):
            if place in cleared:
                one = cleared[place]
                each = one["seconds"] / one["count"]
                print(f"  {place}: {1000 * each:.0f} ms and {one['bytes'] / one['count'] / MIB:.0f} MiB each")
        turbo.revert(model)


if __name__ == "__main__":
    main()
