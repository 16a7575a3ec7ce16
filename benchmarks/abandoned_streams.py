"""What is left of streams that nobody listens to until their end: hooks, threads, files, requests, resident memory.

python benchmarks/abandoned_streams.py [STREAMS] [FAMILY]

A tiny model with random weights. Streams are left before their first block, after one to four blocks, by closing, by
an exception inside ``with``, and by dropping the last reference.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from itertools import islice
from pathlib import Path

import soundfile

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.runtime.cpu import process_memory
from chatterbox_turbo.upstream.families import identify


class InjectedError(Exception):
    """Raised inside the body of a stream's ``with``, on purpose."""


def state(model) -> dict[str, int]:
    """What ought to be after a stream what it was before."""
    gc.collect()
    modules = [module for part in identify(model).modules().values() for module in part.modules()]
    service = model.turbo.token_model.service if model.turbo.token_model is not None else None
    return {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "requests in the batch": len(service) if service is not None else 0,
    }


def leave(model, request, number: int) -> None:
    """Begin a stream and leave it, in one of several ways."""
    texts = {"text": [request["text"]] * 3} if "text" in request else {}  # two of them are open at once
    stream = model.turbo.stream(**{**request, **texts}, seed=number)
    blocks = number % 5
    match number % 3:
        case 0:
            list(islice(stream, blocks))
            stream.close()
        case 1:
            with suppress(InjectedError), stream:
                list(islice(stream, blocks))
                raise InjectedError
        case 2:
            list(islice(stream, blocks))
            del stream


def main(streams: str = "200", family: str = "english") -> None:
    """Print the state after 20 streams and after the last, and resident memory on the way."""
    model = synthetic.build(family, "tiny", stop_after=None if family == "vc" else 120)
    turbo.apply(model, {"decoding": {"progress": "off"}})
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "3 seconds.wav"
        samples, rate = soundfile.read(synthetic.reference_voice(), dtype="float32")
        soundfile.write(recording, samples[: 3 * rate], rate)
        observe(model, arguments(identify(model), "Yes, and no.", audio=str(recording)), int(streams))


def observe(model, request, count: int) -> None:
    """The same, of a model and its request."""
    first = None
    for number in range(1, count + 1):
        leave(model, request, number)
        if number == 20:
            first = state(model)
        if number in (1, 10, 20) or number % max(1, count // 5) == 0:
            print(f"after {number} streams: {process_memory.resident().now / 2**20:.0f} MiB resident", flush=True)
    for name, value in state(model).items():
        before = (first or {}).get(name, value)
        print(f"{name}: {'as after 20 streams' if value == before else f'{before}, now {value}'} ({value})")
    print("seconds of the next speech:", model.generate(**request).size(1) / model.sr)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
