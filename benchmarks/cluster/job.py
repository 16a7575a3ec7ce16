"""Discrete events of ``cluster_model.py``: a batch job, whose lines go in batches to actors with a device each."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from chatterbox_turbo.cluster.packing import VOICE, WAVES, pack

from .devices import TOKENS_PER_SECOND, Device

SLOTS = 8  # lines in T3's batch


def line_lengths(lines: int, median: float, sigma: float, longest: float, seed: int) -> list[int]:
    """Speech tokens of so many lines: a log-normal spread of seconds, cut where a text would be said in pieces."""
    draw = random.Random(seed)
    seconds = (min(longest, median * math.exp(draw.gauss(0.0, sigma))) for _ in range(lines))
    return [max(5, round(TOKENS_PER_SECOND * one)) for one in seconds]


def estimates(lengths: Sequence[int], spread: float, seed: int) -> list[float]:
    """What the driver expects of lines: log-normally off."""
    draw = random.Random(seed + 1)
    return [length * math.exp(draw.gauss(0.0, spread)) for length in lengths]


# -- numbers of lines in batches, the longest lines first; ``sizes``: tokens that the driver expects


def guided(sizes: Sequence[float], actors: int, slots: int = SLOTS) -> list[list[int]]:
    """The package's own rule."""
    return pack(range(len(sizes)), [VOICE + size for size in sizes], slots * WAVES, actors)


def weighted(sizes: Sequence[float], actors: int, slots: int = SLOTS) -> list[list[int]]:
    """As ``equal``, but a line counts its voice too, which flow matching solves with it."""
    return equal([VOICE + size for size in sizes], actors, slots)


def equal(sizes: Sequence[float], actors: int, slots: int = SLOTS) -> list[list[int]]:
    """At most as many lines as ``guided``, and a quarter of an actor's share of all tokens, or one line."""
    packed, filled, share = [], 0.0, sum(sizes) / (4 * actors)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        if not packed or len(packed[-1]) == slots * WAVES or filled + sizes[number] > share:
            packed.append([])
            filled = 0.0
        packed[-1].append(number)
        filled += sizes[number]
    return packed


# -- a batch job


@dataclass(frozen=True)
class Cluster:
    """What devices share; seconds, bytes a second, losses an hour.

    Attributes:
        start: of the job, before its first batch. per_batch, per_line: of the driver's one thread.
        storage: bytes a second of all actors together. per_file: of an actor, to create, rename and record a file.
        audio: bytes of a second of audio. checkpoint: bytes that each actor reads from the storage, 0: it has its own.
        losses: of an actor an hour. replace: until another machine is there.
        uneven: standard deviation of the devices' speeds, a share.
    """

    start: float = 10.0
    per_batch: float = 0.0115
    per_line: float = 0.001
    storage: float = 1e9
    per_file: float = 0.01
    audio: float = 48e3
    checkpoint: float = 0.0
    losses: float = 0.0
    replace: float = 60.0
    uneven: float = 0.05


@dataclass
class Job:
    """What became of a job; shares are of all actors' time, ``span`` seconds each."""

    span: float = 0.0
    useful: float = 0.0
    lines: int = 0
    tokens: int = 0
    lost: int = 0
    audio_hours: float = 0.0
    waits: dict[str, float] | None = None  # seconds of actors by reason

    @property
    def speed(self) -> float:
        """Hours of audio an hour."""
        return self.audio_hours * 3600 / self.span


def run_job(
    device: Device,
    cluster: Cluster,
    batches: Sequence[Sequence[int]],
    actors: int,
    slots: int = SLOTS,
    seed: int = 0,
) -> Job:
    """Actors that take a batch at a time; a batch whose actor is lost is begun again by another one.

    The storage serves one after the other at its full speed, which takes as long as all at once; so does the driver.
    """
    draw, order, job = random.Random(seed), count(), Job()
    waits = dict.fromkeys(("load", "driver", "storage", "again"), 0.0)
    seconds = [device.batch(batch, slots) for batch in batches]
    todo, idle, events = deque(range(len(batches))), [], []
    lines, driver, storage = sum(map(len, batches)), 0.0, 0.0  # all of them; when each of both is free
    speeds = [math.exp(draw.gauss(0.0, cluster.uneven)) for _ in range(actors)]
    pace = [sum(speeds) / actors / speed for speed in speeds]  # so that all together are as fast as even ones
    ends = [math.inf] * actors  # when an actor is lost, if it has a batch then

    def push(when: float, what: str, actor: int, batch: int = -1) -> None:
        heapq.heappush(events, (when, next(order), what, actor, batch))

    def hand_over(now: float, actor: int) -> None:
        nonlocal driver
        if not todo:
            idle.append(actor)
            return
        driver = max(now, driver) + cluster.per_batch
        waits["driver"] += driver - now
        number = todo.popleft()
        if (spoken := driver + seconds[number] * pace[actor]) <= ends[actor]:
            push(spoken, "spoken", actor, number)
        else:
            waits["again"] += max(0.0, ends[actor] - driver)
            push(max(driver, ends[actor]), "lost", actor, number)

    for actor in range(actors):
        push(cluster.start, "begin", actor)
    while events and job.lines < lines:
        now, _, what, actor, number = heapq.heappop(events)
        if what == "begin":
            if cluster.checkpoint:
                storage = max(now, storage) + cluster.checkpoint / cluster.storage
            ready = max(now, storage if cluster.checkpoint else now) + device.load
            waits["load" if now == cluster.start else "again"] += ready - now
            push(ready, "ready", actor)
        elif what == "ready":
            if cluster.losses:
                ends[actor] = now + draw.expovariate(cluster.losses / 3600)
            hand_over(now, actor)
        elif what == "lost":
            job.lost += 1
            todo.appendleft(number)
            if idle:
                hand_over(now, idle.pop())
            waits["again"] += cluster.replace
            push(now + cluster.replace, "begin", actor)
        elif what == "spoken":
            storage = max(now, storage) + sum(batches[number]) / TOKENS_PER_SECOND * cluster.audio / cluster.storage
            written = storage + len(batches[number]) * cluster.per_file
            waits["storage"] += written - now
            push(written, "written", actor, number)
        else:
            job.useful += seconds[number] * pace[actor]
            job.lines += len(batches[number])
            job.tokens += sum(batches[number])
            driver = max(now, driver) + len(batches[number]) * cluster.per_line
            job.span = max(job.span, driver)
            waits["driver"] += driver - now if todo else 0.0
            hand_over(max(now, driver) if todo else now, actor)
    waits["load"] += actors * cluster.start
    waits["tail"] = max(0.0, actors * job.span - job.useful - sum(waits.values()))
    job.audio_hours = job.tokens / TOKENS_PER_SECOND / 3600
    job.waits = waits
    return job
