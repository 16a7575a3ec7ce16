"""How much memory a device has left, and errors that say that it has none."""

from __future__ import annotations

import torch

from ..cpu.process_memory import available


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that can still be had on a device, and bytes that it has in all.

    On CUDA what PyTorch's allocator keeps for reuse counts as free; on a CPU a container's limit counts.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + max(kept, 0), total
    return available() or (0, 0)  # where nothing tells, there is none to spare


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # of the host
