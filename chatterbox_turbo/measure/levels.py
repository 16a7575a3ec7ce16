"""Memory while something runs: readings by a thread, the highest of them, and what they say of each phase."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..runtime.memory import readings

INTERVAL = 0.01  # seconds; one look costs some 50 microseconds


@dataclass
class Levels:
    """Bytes in use: PyTorch's allocator's on CUDA and MPS, elsewhere the resident set of the process.

    ``readings``: (seconds since 1970, bytes). ``highest``: on CUDA the allocator's own, elsewhere that of the readings.
    """

    readings: list[tuple[float, int]] = field(default_factory=list)
    highest: int = 0

    def by_phase(self, request: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """Least, median and most of each phase's readings. ``request``: one of ``Meter.history``."""
        found: dict[str, list[int]] = {}
        for phase in request["phases"]:
            start = request["at"] + phase["start"]
            inside = [level for at, level in self.readings if start <= at <= start + phase["seconds"]]
            found.setdefault(phase["name"], []).extend(inside or [phase["before"], phase["after"]])
        return {
            name: {"least": min(values), "median": int(statistics.median(values)), "most": max(values)}
            for name, values in found.items()
        }


@contextmanager
def memory_levels(device: torch.device) -> Iterator[Levels]:
    """Readings during the body, complete after it.

    A resident set holds both sides' leftovers where two run in one process, for an allocator seldom gives memory back.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    levels, done = Levels(), threading.Event()

    def look() -> None:
        levels.readings.append((time.time(), readings.level(device)))

    def watch() -> None:
        while not done.wait(INTERVAL):
            look()

    look()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield levels
    finally:
        done.set()
        thread.join()
        look()
        highest = torch.cuda.max_memory_allocated(device) if cuda else 0
        levels.highest = max(highest, *(level for _, level in levels.readings))
