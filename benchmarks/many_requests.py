"""What is left of many requests with parts away between them: placement, hooks, mappings, files, resident memory.

python benchmarks/many_requests.py [REQUESTS] [MODE] [FAMILY]

A tiny model with random weights; a new reference voice every tenth request, an error in every hundredth.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.runtime.cpu import process_memory
from chatterbox_turbo.upstream.families import identify


class InjectedError(Exception):
    """Raised in the midst of a request, on purpose."""


def state(model) -> dict[str, int]:
    """What ought to be after a request what it was after the first."""
    gc.collect()
    modules = [module for part in identify(model).modules().values() for module in part.modules()]
    tensors = [t for module in modules for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "addresses of weights": hash(tuple(t.data_ptr() for t in tensors)),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "mappings of files without a name": sum("(deleted)" in line for line in maps),
        "open files": len(os.listdir("/proc/self/fd")),
        "applied again": len(model.turbo.renewals),
    }


def main(requests: str = "1000", mode: str = "sequential", family: str = "english") -> None:
    """Print the state after the first request and the last, and resident memory on the way."""
    model = synthetic.build(family, "tiny", stop_after=6)
    turbo.apply(model, {"decoding": {"progress": "off"}, "offload": {"mode": mode}})
    request = arguments(identify(model), "Yes, and no.")
    flow = model.turbo._engines.flow
    solve = flow._solve

    def fail(*_):
        raise InjectedError

    first, count = None, int(requests)
    for number in range(1, count + 1):
        torch.manual_seed(number)
        if number % 10 == 0:
            model.prepare_conditionals(str(synthetic.reference_voice()), exaggeration=0.3 + number % 7 / 10)
        if number % 100 == 0:
            flow._solve = fail
            with suppress(InjectedError):
                model.generate(**request)
            flow._solve = solve
        model.generate(**request)
        if number in (1, 10, 20) or number % max(1, count // 5) == 0:
            resident = process_memory.resident().now / 2**20
            print(f"after {number} requests: {resident:.0f} MiB resident", flush=True)
        if number == 20:
            first = state(model)
    last = state(model)
    for name, value in last.items():
        before = (first or last)[name]
        print(f"{name}: {'as after 20 requests' if value == before else f'{before}, now {value}'} ({value})")
    print(model.turbo.plan.step("offload").reason)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
