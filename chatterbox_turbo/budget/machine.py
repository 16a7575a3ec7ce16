"""The machine that a model runs on, and the preset that is meant for it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..config.amounts import gigabytes
from ..runtime.device.half_precision import best_format
from ..runtime.memory import readings

GIB = 2**30
# presets by what a card has: sold as 4 GB it has a little less
CARDS = ((3, "vram_2gb"), (5, "vram_4gb"), (7, "vram_6gb"), (10, "vram_8gb"), (20, "vram_12gb"))
LARGEST = "vram_24gb"
OLD_CARDS = ((3, "vram_2gb"), (7, "low_vram"))  # that gain nothing by half precision
SMALL_HOST = 12  # GiB of a machine on which a whole model beside an app is much


@dataclass(frozen=True)
class Machine:
    """A device, as far as it matters to what is chosen.

    Attributes:
        kind: of the device; ``name``: what it calls itself.
        total, free: bytes of its memory; 0 where that cannot be told.
        cores: processors that this process may use.
        half: the half-precision format that it is good at, or an empty string; ``reason``: why.
    """

    kind: str
    name: str
    total: int
    free: int
    cores: int
    half: str
    reason: str

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """The machine of a device."""
        there = readings.free(device) or (0, 0)
        kept = readings.idle(device) or 0 if device.type == "cuda" else 0  # the allocator's own, to be had as well
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(device.type, name, there[1], there[0] + max(kept, 0), cores, *best_format(device))

    def preset(self) -> tuple[str, str]:
        """The preset that is recommended here, and why."""
        size = f"{gigabytes(self.total)} of memory"
        if self.kind == "cuda" and self.half:
            name = next((name for most, name in CARDS if self.total < most * GIB), LARGEST)
            return name, f"a GPU with {size}"
        if self.kind == "cuda":  # where T3 in fp32 is too much, four bits are left
            name = next((name for most, name in OLD_CARDS if self.total < most * GIB), "auto")
            return name, f"a GPU with {size}, {self.reason}"
        if self.kind == "mps":
            return "mps", f"Apple's GPU, {size}"
        if self.total and self.total < SMALL_HOST * GIB:
            return "cpu_small", f"a CPU and {size}"
        if self.half:
            return "fast", f"a CPU that is good at {self.half} ({self.reason}), {size}"
        return "auto", f"a CPU, {self.reason}, {size}"

    def __str__(self) -> str:
        format_ = f"good at {self.half}" if self.half else "fp32 is the fast format"
        return f"{self.name}, {self.cores} cores, {gigabytes(self.free)} of {gigabytes(self.total)} free, {format_}"
