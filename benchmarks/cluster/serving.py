"""Discrete events of ``cluster_model.py``: a server of many replicas, which share what comes."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from .devices import Device

SLOTS, QUEUE, TOKENS = 8, 32, 4  # requests in T3's batch, that wait; tokens between two looks: as in the server
FIRST, CHUNK, LONGEST, CONTEXT, AHEAD, SEEN = 15, 25, 100, 50, 3, 25  # windows of a stream


class Request:
    """A stream on its way."""

    __slots__ = ("arrived", "have", "number", "solved", "total")

    def __init__(self, arrived: float, total: int):
        self.arrived, self.total = arrived, total
        self.have = self.solved = self.number = 0


class Replica:
    """One device with a thread that does one thing at a time, as ``server/worker.py`` orders it."""

    def __init__(self, device: Device, positions: float, slots: int):
        self._device, self._positions, self._slots = device, positions, slots
        self._sounds: dict[tuple[int, int], float] = {}
        self.waiting: deque[Request] = deque()
        self.flight: deque[Request] = deque()
        self.busy = False

    def __len__(self) -> int:
        return len(self.waiting) + len(self.flight)

    def work(self) -> tuple[float, Request | None, Request | None]:
        """Seconds of what is done next, whose first audio it makes, and who has ended with it."""
        if self.waiting and len(self.flight) < self._slots:
            self.flight.append(request := self.waiting.popleft())
            return self._device.enter(request.total), None, None
        request = next((one for one in self.flight if not one.solved), self.flight[0])
        self.flight.remove(request)
        self.flight.append(request)
        size = FIRST if not request.number else min(LONGEST, CHUNK << min(8, request.number - 1))
        ahead = min(SEEN, AHEAD << min(8, request.number))
        wanted, seconds = min(request.total, request.solved + size + ahead), 0.0
        if request.have < wanted:
            tokens = min(TOKENS, wanted - request.have)
            decoding = [one for one in self.flight if one.have < one.total]
            seconds = tokens * self._device.step(len(decoding), self._positions)
            for one in decoding:
                one.have = min(one.total, one.have + tokens)
            if request.have < wanted:
                return seconds, None, None
        new = min(size, request.total - request.solved)
        other = min(CONTEXT, request.solved) + wanted - request.solved - new
        seconds += self._sound(new, max(0, other))
        first = request if not request.solved else None
        request.solved, request.number = request.solved + new, request.number + 1
        return seconds, first, request if request.solved >= request.total else None

    def _sound(self, new: int, other: int) -> float:
        if (new, other) not in self._sounds:
            self._sounds[new, other] = self._device.sound(new, other)
        return self._sounds[new, other]


@dataclass(frozen=True)
class Autoscaling:
    """As Ray Serve's, whose defaults are 30 s each.

    Attributes:
        most: replicas. target: requests for each; by default half of the slots, as the package asks for.
        delay: seconds that more replicas are wanted before they are started.
        look_back: seconds whose mean number of requests counts.
    """

    most: int
    target: float = SLOTS // 2
    delay: float = 30.0
    look_back: int = 30


@dataclass
class Served:
    """What became of requests: seconds to the first audio, seconds in all, refused, tokens, replicas at the end."""

    first: list[float]
    whole: list[float]
    refused: int = 0
    tokens: int = 0
    replicas: int = 0
    span: float = 0.0


def serve(
    device: Device,
    arrivals: Sequence[float],
    lengths: Sequence[int],
    replicas: int,
    *,
    slots: int = SLOTS,
    queue: int = QUEUE,
    choices: int = 2,
    scaling: Autoscaling | None = None,
    seed: int = 0,
) -> Served:
    """Requests by the time of their arrival, each to the less loaded of two replicas; refused where both are full."""
    draw, order, result = random.Random(seed), count(), Served([], [])
    positions = device.family.positions(sum(lengths) / len(lengths))
    pool = [Replica(device, positions, slots) for _ in range(replicas)]
    events: list[tuple[float, int, str, object]] = [(arrivals[0], next(order), "arrival", 0)]
    starting, wanted_since, alive = 0, math.inf, len(arrivals)
    seen: deque[int] = deque(maxlen=scaling.look_back if scaling else 1)
    if scaling:
        heapq.heappush(events, (arrivals[0], next(order), "look", None))

    def go_on(now: float, replica: Replica) -> None:
        replica.busy = bool(len(replica))
        if not replica.busy:
            return
        seconds, first, ended = replica.work()
        heapq.heappush(events, (now + seconds, next(order), "free", (replica, first, ended)))

    while events and alive:
        now, _, what, data = heapq.heappop(events)
        result.span = now
        if what == "arrival":
            if data + 1 < len(arrivals):
                heapq.heappush(events, (arrivals[data + 1], next(order), "arrival", data + 1))
            replica = min(draw.sample(pool, min(choices, len(pool))), key=len)
            if len(replica) >= slots + queue:
                result.refused, alive = result.refused + 1, alive - 1
                continue
            replica.waiting.append(Request(now, lengths[data]))
            if not replica.busy:
                go_on(now, replica)
        elif what == "free":
            replica, first, ended = data
            if first:
                result.first.append(now - first.arrived)
            if ended:
                replica.flight.remove(ended)
                result.whole.append(now - ended.arrived)
                result.tokens, alive = result.tokens + ended.total, alive - 1
            go_on(now, replica)
        elif what == "started":
            pool.append(Replica(device, positions, slots))
            starting -= 1
        else:
            seen.append(sum(map(len, pool)))
            wanted = min(scaling.most, math.ceil(sum(seen) / len(seen) / scaling.target))
            wanted_since = min(wanted_since, now) if wanted > len(pool) + starting else math.inf
            if now - wanted_since >= scaling.delay:
                for _ in range(wanted - len(pool) - starting):
                    heapq.heappush(events, (now + device.load, next(order), "started", None))
                    starting += 1
                wanted_since = math.inf
            heapq.heappush(events, (now + 1.0, next(order), "look", None))
    result.replicas = len(pool)
    return result
