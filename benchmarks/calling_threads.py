"""What ``generate`` takes in the thread that has loaded the model, and in the threads of a pool, on a CPU.

python benchmarks/calling_threads.py [FAMILY] [PRESET] [TOKENS] [CALLS] [SIZE]

Random weights. GNU OpenMP keeps a pool for each thread that has computed; how its threads wait is what the
environment said as the process began. Compare ``OMP_WAIT_POLICY=active GOMP_SPINCOUNT=300000``, as
``chatterbox-turbo run`` has it, with ``GOMP_SPINCOUNT=300000`` alone, which is how they wait where nobody says.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.upstream.families import identify

TEXT = "The tide went out before noon, and nobody had asked the captain whether it would come back."


def main(
    family: str = "turbo", preset: str = "fast", tokens: str = "100", calls: str = "5", size: str = "full"
) -> None:
    """Print median, least and most, whole and of T3."""
    model = synthetic.build(family, size, stop_after=int(tokens))
    turbo.apply(model, {"preset": preset, "decoding": {"progress": "off"}})
    request = arguments(identify(model), TEXT)

    def call() -> tuple[float, float]:
        torch.manual_seed(0)
        start = time.perf_counter()
        model.generate(**request)
        return time.perf_counter() - start, model.turbo.timings()["t3"]

    def show(where: str, each: list[tuple[float, float]]) -> None:
        columns = (sorted(column) for column in zip(*each, strict=True))
        told = (f"{statistics.median(one):.2f} ({one[0]:.2f} to {one[-1]:.2f})" for one in columns)
        print(f"{where:<24}{'   of which T3 '.join(told)} s", flush=True)

    call()
    show("the loading thread", [call() for _ in range(int(calls))])
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(call) for _ in range(2)]:
            future.result()
        show("threads of a pool", [pool.submit(call).result() for _ in range(int(calls))])
    show("the loading thread", [call() for _ in range(int(calls))])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
