"""``cluster_model.py check``: what the simulations must give where a formula tells, and what was measured."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from math import exp, inf
from pathlib import Path
from tempfile import TemporaryDirectory

from .devices import FAMILIES, FRAMES_PER_TOKEN, PROMPT_FRAMES, Device, block_operations, from_bench, profiles
from .job import VOICE, Cluster, equal, guided, line_lengths, run_job
from .serving import Autoscaling, Served, serve

FREE = Cluster(0.0, 0.0, 0.0, inf, 0.0, uneven=0.0)  # nothing but devices costs anything


def ideal(step: float, load: float = 0.0) -> Device:
    """A device whose step takes as long for any number of requests, and which does nothing else."""
    return Device(FAMILIES["turbo"], ((1, step),), inf, 1e-15, inf, inf, inf, 0.0, 0.0, load, "ideal")


def check() -> int:
    """Print a line for each; the number of those that do not hold."""
    wrong = 0
    print("| | expected | model | error | at most |\n|---|---|---|---|---|")
    for name, expected, found, most in (*of_jobs(), *of_servers(), *of_counts(), *of_measurements()):
        error = found / expected - 1 if expected else found
        wrong += abs(error) > most
        said = "" if abs(error) <= most else " **does not hold**"
        print(f"| {name} | {expected:.4g} | {found:.4g} | {error:+.1%} | {most:.2g}{said} |")
    return wrong


def of_jobs():
    """Names, what a formula gives, what the simulation gives, and the relative error that it may have."""
    device = ideal(0.01, load=7.0)
    batches = [[100] * 32] * 20  # four waves of a second
    yield "one device: load + work, s", 7 + 20 * 4, run_job(device, FREE, batches, 1).span, 1e-9
    yield "eight devices: three rounds, s", 7 + 3 * 4, run_job(device, FREE, batches, 8).span, 1e-9
    yield "more devices than batches, s", 7 + 4, run_job(device, FREE, batches, 1024).span, 1e-9
    slow = replace(FREE, per_batch=0.5, per_line=0.25)
    yield "driver alone, s", 20 * 0.5 + 640 * 0.25, run_job(ideal(1e-9), slow, batches, 64).span, 1e-6
    slow = replace(FREE, storage=1e6)
    yield "storage alone, s", 64_000 / 25 * 48e3 / 1e6, run_job(ideal(1e-9), slow, batches, 64).span, 1e-6
    lost = run_job(device, replace(FREE, losses=3600 / 10, replace=20.0), batches * 100, 1, seed=1)
    yield "a batch of 4 s, losses every 10 s, s", (exp(0.4) - 1) * (10 + 27), lost.span / 2000, 0.05
    lengths = line_lengths(3000, 6.0, 0.6, 36.0, 1)
    for rule in (guided, equal):
        numbers = rule(lengths, 50)
        yield f"lines of {rule.__name__} batches", 3000, len({one for batch in numbers for one in batch}), 0.0
        losing = replace(Cluster(), losses=2.0)
        job = run_job(profiles("english", 1)["cpu"], losing, [[lengths[one] for one in b] for b in numbers], 50)
        yield f"audio of {rule.__name__} batches, {job.lost} actors lost, s", sum(lengths) / 25, job.tokens / 25, 1e-12
        # what was begun and not over at the end is counted too
        yield "seconds of all actors, by reason", 50 * job.span, job.useful + sum(job.waits.values()), 0.03
    yield "tokens of a voice, as the package's batches count it", PROMPT_FRAMES / FRAMES_PER_TOKEN, VOICE, 0.0
    yield "slots: lines of equal length go in waves, s", 2 * 100 * 0.01, device.decode([100] * 16, 8), 1e-9


def of_servers():
    """As ``of_jobs``; one slot, so that a replica is a queue with one server."""

    def mean_seconds(load: float, replicas: int, requests: int, fixed: bool) -> float:
        draw, now, arrivals = random.Random(4), 0.0, []
        for _ in range(requests):
            arrivals.append(now := now + draw.expovariate(load * replicas))
        lengths = [4.0 if fixed else draw.expovariate(0.25) for _ in range(requests)]
        served = serve(ideal(0.25), arrivals, lengths, replicas, slots=1, queue=10**9)  # a second each, on average
        return sum(served.whole) / len(served.whole)

    yield "M/D/1 at 0.6: seconds in the server", 1 + 0.6 / (2 * 0.4), mean_seconds(0.6, 1, 60_000, True), 0.05
    yield "M/M/1 at 0.6", 1 / 0.4, mean_seconds(0.6, 1, 60_000, False), 0.05
    limit = sum(0.8 ** (2**depth - 2) for depth in range(1, 8))
    yield "less loaded of two, 100 queues at 0.8 (limit of many)", limit, mean_seconds(0.8, 100, 60_000, False), 0.05
    arrivals, lengths = [0.1 * number for number in range(2000)], line_lengths(2000, 6.0, 0.6, 36.0, 2)
    served = serve(profiles("english", 1)["gpu-small"], arrivals, lengths, 2, scaling=Autoscaling(4))
    yield "requests: served and refused", 2000, len(served.whole) + served.refused, 0.0
    yield "every served one was heard first", len(served.whole), len(served.first), 0.0
    if not served.refused:
        yield "audio of a server, s", sum(lengths) / 25, served.tokens / 25, 1e-12


def of_counts():
    """As ``of_jobs``: operations that docs/benchmarks.md has, and a device that ``bench`` has measured."""
    yield "a block of 900 frames and two rows, GFLOP", 7.1, 2 * block_operations(900) / 1e9, 0.01
    run = {"tokens": 100, "t3": 30.0, "t3_step": 25.0, "flow": 4.0, "vocoder": 0.5, "watermark": 0.1}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        file.write_text(json.dumps({"runs": [{"upstream": {}, "optimized": run}]}))
        measured = from_bench(profiles("english", 1)["gpu-small"], file)
    yield "the request of bench --json, from a device made of it, s", 3 + 4 + 0.5 + 0.1, measured.batch([100], 1), 1e-6


def of_measurements():
    """As ``of_jobs``: what docs/benchmarks.md and docs/streaming.md have beside the profile's figures."""
    cpu = {family: profiles(family, 1)["cpu"] for family in FAMILIES}

    def alone(family: str, tokens: int) -> float:
        return cpu[family].batch([tokens], 1)

    yield "English, 41 tokens, end to end, s", 6.07, alone("english", 41), 0.15
    yield "Multilingual, 100 tokens, end to end, s", 9.83, alone("english", 100), 0.15
    yield (
        "English, 200 tokens, end to end (flow and vocoder: the profile's), s",
        17.4,
        alone("english", 200),
        0.15,
    )
    yield "Turbo, 60 tokens, end to end, s", 2.83, alone("turbo", 60), 0.15
    yield "English, 8 x 200 tokens, T3, tokens/s", 113, 1600 / cpu["english"].decode([200] * 8, 8), 0.15
    yield "English, 8 x 50 tokens, batch (earlier kernels), s", 52.4, cpu["english"].batch([50] * 8, 8), 0.15
    stream: Served = serve(cpu["turbo"], [0.0], [150], 1)
    whole = alone("turbo", 150)
    yield "Turbo, 150 tokens: first block over generate, another machine", 3.2 / 11.7, stream.first[0] / whole, 0.35
    yield "its whole stream over generate", 16.5 / 11.7, stream.whole[0] / whole, 0.15
