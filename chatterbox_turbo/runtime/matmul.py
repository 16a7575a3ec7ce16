"""Matrix products in fp32 on CPUs by oneDNN, in place of the BLAS that PyTorch is linked with.

PyTorch gives fp32 products to MKL, which on AMD processors can reach half of oneDNN's speed (measured:
``benchmarks/conditioning.py --products``). oneDNN comes with PyTorch and reads the weights as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUNDS = 4


def onednn() -> Callable[..., Tensor] | None:
    """``linear(x, weight, bias)`` by oneDNN, or ``None`` where this PyTorch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        operator: Any = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operator(x, weight, bias, "none", [], "")

    return linear


def linear_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A ``forward`` for one module: (..., in) to (..., out) by oneDNN; anything but fp32 on a CPU goes the old way.

    oneDNN's operator has no derivative, so that a call which records a graph goes the old way too.
    """
    by_onednn, original = onednn(), type(module).forward

    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        fp32 = x.dtype == weight.dtype == torch.float32
        if not fp32 or x.device.type != "cpu" or weight.device.type != "cpu" or not x.numel():
            return original(module, x)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return original(module, x)
        return by_onednn(x, weight, bias)

    return forward


@torch.no_grad()
def onednn_is_faster(module: nn.Linear, rows: int) -> bool:
    """Whether oneDNN computes ``rows`` rows of this layer faster than PyTorch's own choice, here and now."""
    linear = onednn()
    weight = module.weight.detach()
    if linear is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    x = torch.zeros(1, rows, module.in_features)
    candidates = (lambda: linear(x, weight, module.bias), lambda: F.linear(x, weight, module.bias))
    seconds = []
    for candidate in candidates:
        candidate()
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.perf_counter()
            candidate()
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    return seconds[0] < seconds[1]
