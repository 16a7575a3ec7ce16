"""How much speech a cluster of 1 to 1024 devices makes, what limits it, and how soon speech is heard, by simulation.

python benchmarks/cluster_model.py TABLE … [--profile cpu] [--family english] [--share 1] [--bench bench.json]
    [--tokens-per-second 1:36 8:161] [--lines 100000] [--rule guided]

Tables: ``profiles``, all devices that there are figures for; ``device``, one of them; ``job``, a batch job on 1, 2,
4, … of it; ``rules``, the package's way to make its batches and two simpler ones (the last of ``--lines``); ``serve``,
first audio by load, and replicas for a load; ``burst``, what autoscaling costs; ``check``, formulas and measured
figures against the model, with exit code 1 where one does not hold. Without any: all of them.

Profiles: ``cpu`` has figures that were measured; ``gpu-small`` and ``gpu-large`` are floors from counted bytes and
operations and the rates of data sheets, and no GPU has confirmed them. ``--share`` is the share of these rates that is
reached. ``--bench`` takes a device from ``chatterbox-turbo bench --json``, and the other options take single figures.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from dataclasses import fields
from pathlib import Path

from cluster.check import check
from cluster.devices import (
    FAMILIES,
    FRAMES_PER_TOKEN,
    PROFILES,
    PROMPT_FRAMES,
    TOKENS_PER_SECOND,
    Device,
    from_bench,
    profiles,
    with_figures,
)
from cluster.job import SLOTS, Cluster, equal, estimates, guided, line_lengths, run_job, weighted
from cluster.serving import Autoscaling, Served, serve

RULES = {rule.__name__: rule for rule in (guided, equal, weighted)}
TABLES = ("profiles", "device", "job", "rules", "serve", "burst", "check")
PER_DEVICE = ("bandwidth", "rate", "vocoder", "prefill", "kernel", "marking", "load")
REQUESTS, SECONDS = 4000, 180.0  # of a row of ``serve``, at least


def row(*cells: object) -> None:
    """A line of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(*cells: str) -> None:
    """The first two lines of one."""
    print()
    row(*cells)
    print("|" + "---|" * len(cells))


def lines_of(options: argparse.Namespace, lines: int) -> tuple[list[int], list[float]]:
    """Speech tokens of lines, and what the driver expects of them."""
    lengths = line_lengths(lines, options.median, options.sigma, options.longest, options.seed)
    return lengths, estimates(lengths, options.off, options.seed)


def device_table(device: Device, options: argparse.Namespace) -> None:
    """Tokens a second by requests in the batch, and where a second of audio goes."""
    tokens = round(options.median * TOKENS_PER_SECOND)
    head("requests in T3's batch", "ms a step", "tokens/s", "audio s/s, T3 alone")
    for requests in (1, 2, 4, 8):
        step = device.step(requests, device.family.positions(tokens))
        speed = requests / step
        row(requests, f"{1000 * step:.3g}", f"{speed:,.0f}", f"{speed / TOKENS_PER_SECOND:,.3g}")
    decoding, flow, vocoder = work(device, options)
    head("seconds of work for a second of audio", "T3, eight at once", "flow matching", "vocoder, mark", "together")
    row("lines as in `job`", *(f"{one:.3g}" for one in (decoding, flow, vocoder, decoding + flow + vocoder)))


def work(device: Device, options: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds for a second of audio: T3 with all slots, flow matching, vocoder and watermark."""
    lengths, expected = lines_of(options, 2000)
    batches = [[lengths[number] for number in batch] for batch in guided(expected, 1, options.slots)]
    audio = sum(lengths) / TOKENS_PER_SECOND
    decoding = sum(device.decode(batch, options.slots) for batch in batches) / audio
    flow = sum(device.flow(PROMPT_FRAMES + FRAMES_PER_TOKEN * length) for length in lengths) / audio
    return decoding, flow, sum(map(device.sound, lengths)) / audio - flow


def profiles_table(options: argparse.Namespace) -> None:
    """Every profile and family: where time goes, and devices for hours of audio a day."""
    days = (100, 1000, 10_000, 100_000)
    wanted = (f"for {hours:,} h a day" for hours in days)
    head("profile", "family", "share", "T3, eight at once", "flow matching", "vocoder, mark", "audio h/h", *wanted)
    for name in PROFILES:
        for family in FAMILIES:
            for share in (1.0,) if name == "cpu" else (1.0, 0.3):
                parts = work(profiles(family, share)[name], options)
                devices = (math.ceil(hours / 24 * sum(parts)) for hours in days)
                cells = (name, family, "measured" if name == "cpu" else f"{share:.0%}")
                row(*cells, *(f"{one:.3g}" for one in parts), f"{1 / sum(parts):.3g}", *(f"{n:,}" for n in devices))


def job_table(device: Device, cluster: Cluster, options: argparse.Namespace, lines: int, rules: list[str]) -> None:
    """A job by the number of devices."""
    lengths, expected = lines_of(options, lines)
    hours = sum(lengths) / TOKENS_PER_SECOND / 3600
    whole = guided(expected, 1, options.slots)
    alone = sum(device.batch([lengths[number] for number in batch], options.slots) for batch in whole)
    print(f"\n{lines:,} lines, {hours:,.1f} hours of audio; one device: {alone / 3600:,.1f} hours.")
    names = ("devices", "rule", "batches", "lines each", "job, s", "audio h/h", "efficiency")
    head(*names, "load", "small batches", "driver", "storage", "lost", "tail", "limit")
    for actors in options.devices:
        for rule in rules:
            numbers = RULES[rule](expected, actors, options.slots)
            batches = [[lengths[number] for number in batch] for batch in numbers]
            job = run_job(device, cluster, batches, actors, options.slots, options.seed)
            parts = {"load": job.waits["load"], "small batches": max(0.0, job.useful - alone)}
            parts |= {"driver": job.waits["driver"], "storage": job.waits["storage"]}
            parts |= {"lost": job.waits["again"], "tail": job.waits["tail"]}
            shares = {name: part / (actors * job.span) for name, part in parts.items()}
            limit = max(shares, key=shares.get)
            sizes = [len(batch) for batch in batches]
            cells = [actors, rule, len(batches), f"{min(sizes)} to {max(sizes)}", f"{job.span:,.0f}"]
            cells += [f"{job.speed:,.3g}" if job.speed < 1000 else f"{job.speed:,.0f}"]
            cells += [f"{alone / actors / job.span:.0%}", *(f"{share:.0%}" for share in shares.values())]
            row(*cells, limit if shares[limit] > 0.05 else "devices")


def arrivals_at(rates: list[tuple[float, float]], seed: int) -> list[float]:
    """Times of requests; ``rates``: (requests a second, seconds that it lasts)."""
    draw, times, begun = random.Random(seed + 2), [], 0.0
    for rate, seconds in rates:
        now = begun
        while (now := now + draw.expovariate(rate)) < begun + seconds:
            times.append(now)
        begun += seconds
    return times


def quantile(values: list[float], share: float) -> float:
    """Of at least one value."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def capacity(device: Device, options: argparse.Namespace) -> float:
    """Requests a second of one replica whose slots are never empty."""
    lengths, _ = lines_of(options, 1000)
    return 1000 / serve(device, [0.0] * 1000, lengths, 1, slots=options.slots, queue=10**6).span


def served_at(device: Device, options: argparse.Namespace, rate: float, replicas: int, choices: int = 2) -> Served:
    """Requests at a steady rate, long enough for every replica to see many."""
    times = arrivals_at([(rate, max(REQUESTS / rate, SECONDS))], options.seed)
    lengths, _ = lines_of(options, len(times))
    return serve(device, times, lengths, replicas, slots=options.slots, choices=choices, seed=options.seed)


def serve_tables(device: Device, options: argparse.Namespace) -> None:
    """First audio by utilization, and replicas for a load."""
    most = capacity(device, options)
    audio = most * sum(lines_of(options, 1000)[0]) / 1000 / TOKENS_PER_SECOND
    print(f"\n{options.slots} requests always in flight: {most:.3g} requests a second, {audio:.3g} s of audio.")
    head("replicas", "utilization", "first audio, s: p50", "p95", "p99", "p95, replica by chance", "refused")
    for replicas in options.replicas:
        for share in options.utilization:
            served = served_at(device, options, share * most * replicas, replicas)
            chance = served_at(device, options, share * most * replicas, replicas, choices=1)
            times = [f"{quantile(served.first, part):.2f}" for part in (0.5, 0.95, 0.99)]
            refused = served.refused / (served.refused + len(served.whole))
            row(replicas, f"{share:.0%}", *times, f"{quantile(chance.first, 0.95):.2f}", f"{refused:.1%}")
    alone = serve(device, [0.0], [round(options.median * TOKENS_PER_SECOND)], 1).first[0]
    print(f"\nThe first audio of a request that is alone: {alone:.2f} s.")
    if alone > 1.0 or not options.requests:
        return
    head("requests a second", "replicas by throughput", "for p95 of first audio under 1 s", "utilization", "p95, s")
    for rate in options.requests:
        fewest = math.ceil(rate / most)
        low, high = fewest - 1, fewest
        while (served := served_at(device, options, rate, high)).refused or quantile(served.first, 0.95) > 1.0:
            low, high = high, math.ceil(high * 1.25) + (high < 4)
            if high > 8 * fewest + 8:
                row(f"{rate:g}", fewest, "not reached", "", f"{quantile(served.first, 0.95):.2f}")
                break
        else:
            while high - low > 1:
                middle = (low + high) // 2
                tried = served_at(device, options, rate, middle)
                if middle >= fewest and not tried.refused and quantile(tried.first, 0.95) <= 1.0:
                    high, served = middle, tried
                else:
                    low = middle
            row(f"{rate:g}", fewest, high, f"{rate / high / most:.0%}", f"{quantile(served.first, 0.95):.2f}")


def burst_table(device: Device, options: argparse.Namespace) -> None:
    """A load that grows from one replica's half to six replicas' within a moment."""
    most = capacity(device, options)
    times = arrivals_at([(0.5 * most, 60.0), (6 * most, 300.0)], options.seed)
    lengths, _ = lines_of(options, len(times))
    print(f"\n{0.5 * most:.3g} requests a second for 60 s, {6 * most:.3g} for 300 s; at most 12 replicas.")
    print(f"A replica is there {device.load:.0f} s after it was asked for.")
    names = ("replicas at first", "target", "delay and look-back, s", "at the end")
    head(*names, "first audio, s: p50", "p95", "refused")
    fixed = ((8, 0, 0, 0), (1, 0, 0, 0))
    scaled = (
        (1, 8, 30, 30),
        (1, 8, 0, 1),
        (1, 4, 30, 30),
        (1, 4, 10, 10),
        (1, 4, 0, 1),
        (1, 2, 30, 30),
        (4, 4, 10, 10),
    )
    for replicas, target, delay, back in (*fixed, *scaled):
        scaling = Autoscaling(12, target, delay, back) if target else None
        served = serve(device, times, lengths, replicas, slots=options.slots, scaling=scaling, seed=options.seed)
        said = (target, f"{delay} and {back}") if target else ("as they are", "")
        heard = (f"{quantile(served.first, 0.5):.2f}", f"{quantile(served.first, 0.95):.2f}")
        row(replicas, *said, served.replicas, *heard, f"{served.refused / len(times):.1%}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    add("--profile", default="cpu", choices=PROFILES)
    add("--family", default="english", choices=FAMILIES)
    add("--share", type=float, default=1.0, help="of a GPU's bandwidth and operations that is reached")
    add("--bench", type=Path, help="what `chatterbox-turbo bench --json` has written")
    add("--tokens-per-second", nargs="+", default=[], metavar="REQUESTS:TOKENS", help="of T3, by requests at once")
    for name in PER_DEVICE:
        add(f"--{name}", type=float, help="of a device, as in cluster/devices.py")
    for field in fields(Cluster):
        add(f"--{field.name.replace('_', '-')}", type=float, default=field.default, help="as in cluster/job.py")
    add("--lines", type=int, nargs="+", default=[100_000, 2_000])
    add("--devices", type=int, nargs="+", default=[2**power for power in range(11)])
    add("--rule", default="guided", choices=RULES, help="of batches; guided: the package's")
    add("--median", type=float, default=6.0, help="seconds of a line")
    add("--sigma", type=float, default=0.6, help="of its logarithm")
    add("--longest", type=float, default=36.0, help="seconds of a line at most")
    add("--off", type=float, default=0.15, help="standard deviation of the logarithm of what the driver expects")
    add("--replicas", type=int, nargs="+", default=[1, 8, 32], help="of the first table of serve")
    add("--utilization", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2], help="likewise")
    add("--requests", type=float, nargs="*", default=[1, 10, 100], help="a second, of its second table")
    add("--slots", type=int, default=SLOTS, help="requests in T3's batch at once")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"there is no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    return options


def main() -> None:
    """Print what is asked for."""
    options = parsed()
    tables = options.tables or TABLES
    device = profiles(options.family, options.share)[options.profile]
    if options.bench:
        device = from_bench(device, options.bench)
    figures = {name: getattr(options, name) for name in PER_DEVICE}
    device = with_figures(device, figures, options.tokens_per_second)
    cluster = Cluster(**{field.name: getattr(options, field.name) for field in fields(Cluster)})
    print(f"{options.profile}, {options.family}, share {options.share:g}: {device.source}")
    if "profiles" in tables:
        profiles_table(options)
    if "device" in tables:
        device_table(device, options)
    for lines in options.lines if "job" in tables else ():
        job_table(device, cluster, options, lines, [options.rule])
    if "rules" in tables:
        job_table(device, cluster, options, options.lines[-1], list(RULES))
    if "serve" in tables:
        serve_tables(device, options)
    if "burst" in tables:
        burst_table(device, options)
    if "check" in tables:
        print()
        sys.exit(check() > 0)


if __name__ == "__main__":
    main()
