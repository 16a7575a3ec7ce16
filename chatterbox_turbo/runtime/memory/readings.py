"""How much memory is in use, was at most, is free, and lies idle: one set of functions for every kind of device.

CUDA: what PyTorch's allocator has handed out. MPS: likewise, without a peak. CPU: resident memory of the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..cpu import cold, process_memory
from .holdings import storage_of

_highest: dict[torch.device, int] = {}  # peaks that were read before the counter began anew


def reading(device: torch.device) -> tuple[int, int | None]:
    """Bytes in use now (0 where that cannot be told), and at most since the counter of that began, if there is one."""
    if device.type == "cuda":  # memory_allocated and its like make a flat table of a hundred entries, each
        bytes_in_use = torch.cuda.memory_stats_as_nested_dict(device).get("allocated_bytes", {}).get("all", {})
        return bytes_in_use.get("current", 0), bytes_in_use.get("peak", 0)
    if device.type == "mps":
        return torch.mps.current_allocated_memory(), None
    resident = process_memory.resident()
    return (resident.now, resident.peak) if resident else (0, None)


def level(device: torch.device) -> int:
    """Bytes in use now; 0 where that cannot be told."""
    return reading(device)[0]


def reset_peak(device: torch.device) -> bool:
    """Let the counter begin anew, for the whole process; whether that was possible. ``highest`` knows the old one."""
    before = reading(device)[1]
    if before is None:
        return False
    _highest[device] = max(before, _highest.get(device, 0))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return process_memory.reset_peak()


def highest(device: torch.device) -> int | None:
    """Bytes in use at most since the process began, however often the counter has begun anew here."""
    now = reading(device)[1]
    return None if now is None else max(now, _highest.get(device, 0))


def free(device: torch.device) -> tuple[int, int] | None:
    """Bytes that are still to be had on a device, and all that it has, or ``None``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return max(0, total - torch.mps.driver_allocated_memory()), total
    return process_memory.available()


def in_memory(modules: Iterable[nn.Module], device: torch.device) -> int:
    """Bytes of parameters and buffers that are in a device's memory now; on a CPU by pages, where that can be told."""
    own = [t for module in modules for t in (*module.parameters(), *module.buffers()) if t.device.type == device.type]
    storages = {address: size for address, size in map(storage_of, own) if size}
    return cold.resident(storages.items()) if device.type == "cpu" else sum(storages.values())


def idle(device: torch.device) -> int | None:
    """Bytes that an allocator holds and nobody uses, or ``None`` where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory()
    heap = process_memory.heap()
    return None if heap is None else heap.free


def fragmentation(device: torch.device) -> dict[str, Any]:
    """What the device's allocator holds against what is in use; ``fragmentation``: the share that is not.

    CUDA: ``reserved``, ``allocated``, ``inactive_split`` (free parts of blocks that are in use elsewhere, which
    clearing does not give back). MPS: ``reserved``, ``allocated``. CPU: ``process_memory.Heap``, and ``resident``.
    Empty where nothing can be told.
    """
    if device.type in ("cuda", "mps"):
        on_cuda = device.type == "cuda"
        reserved = torch.cuda.memory_reserved(device) if on_cuda else torch.mps.driver_allocated_memory()
        allocated = level(device)
        found = {"reserved": reserved, "allocated": allocated}
        if on_cuda:
            found["inactive_split"] = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
        return {**found, "fragmentation": 1 - allocated / reserved if reserved else 0.0}
    heap, resident = process_memory.heap(), process_memory.resident()
    found = heap.to_dict() if heap else {}
    return {**found, "resident": resident.now} if resident else found


def graph_pools(device: torch.device) -> dict[str, int]:
    """Bytes of the memory pools that CUDA graphs keep to themselves: all of this process's, whoever captured them.

    ``reserved``: segments of the driver's; ``allocated``: what tensors of graphs that are alive lie in.
    """
    if device.type != "cuda":
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    private = [
        segment
        for segment in torch.cuda.memory_snapshot()
        if segment.get("device") == index and tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    ]
    sizes = {"reserved": "total_size", "allocated": "allocated_size"}
    return {name: sum(segment[key] for segment in private) for name, key in sizes.items()} if private else {}
