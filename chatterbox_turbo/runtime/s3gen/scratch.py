"""Memory that intermediate results share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


class Scratch:
    """Memory for intermediate results by name, kept from step to step on a CPU.

    On CUDA, whose allocator keeps memory by itself and whose graphs hold on to addresses, and in code that is being
    compiled, whose compiler plans memory by itself, every result is a new tensor.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """A tensor whose content means nothing; the one of this name from before is overwritten with it."""
        if device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        kept = self._kept.get(name)
        if kept is None or kept.numel() < size:
            self._kept.pop(name, None)  # before the new one is there
            kept = self._kept[name] = torch.empty(size, dtype=torch.uint8)
        return kept[:size].view(dtype).view(shape)

    def release(self) -> None:
        """Give the memory back."""
        self._kept.clear()
