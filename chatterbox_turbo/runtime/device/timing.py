"""How long each phase of a generation takes, without adding a device sync to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Seconds by phase. On CUDA it is bracketed by events, which are read only when asked for; MPS is waited for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, object, object]] = []

    def clear(self) -> None:
        """Forget all phases."""
        self._spans.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body; several bodies of one name add up. A body that raises is not counted."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Total seconds by phase, in the order in which the phases first ended."""
        spans = list(self._spans)  # another thread may be adding to them
        totals: dict[str, float] = {}
        for name, start, end in spans:
            if self._cuda:  # not the device: another thread may be capturing on it
                end.synchronize()  # type: ignore[attr-defined]
            span = start.elapsed_time(end) / 1000 if self._cuda else end - start  # type: ignore[attr-defined, operator]
            totals[name] = totals.get(name, 0.0) + span
        return totals

    def _now(self) -> object:
        if self._device.type == "mps":  # or what is still queued would count for the next phase
            torch.mps.synchronize()
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
