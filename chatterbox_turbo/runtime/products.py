"""Matrix products with many rows: by oneDNN where that is faster than the BLAS library that torch links.

On a CPU torch gives fp32 products to MKL, which reaches half the speed of oneDNN on processors that are not Intel's,
while half precision and convolutions go to oneDNN by themselves.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 32  # rows below which reading the weights is the limit, and not arithmetic
_ROWS, _INNER, _OUTER, _REPEATS = 1024, 256, 1024, 5


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: (…, in) to (…, out)."""
    if torch.compiler.is_compiling() or x.numel() // x.size(-1) < FEW or not suits(x):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def suits(x: Tensor) -> bool:
    """Whether oneDNN computes products of ``x`` faster here."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and onednn_is_faster(torch.get_num_threads())


@functools.cache
def onednn_is_faster(threads: int) -> bool:
    """Whether a product of the usual size takes less time by oneDNN; measured once a process, in some 30 ms."""
    with torch.inference_mode(False), torch.no_grad():
        x, weight = torch.ones(_ROWS, _INNER), torch.ones(_OUTER, _INNER)
        try:
            return _least(lambda: _onednn(x, weight, None)) < 0.9 * _least(lambda: F.linear(x, weight))
        except (AttributeError, RuntimeError, NotImplementedError):  # a build without oneDNN, or another signature
            return False


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _least(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])
