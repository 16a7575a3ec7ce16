"""Matrix products in fp32 on CPUs by oneDNN, where that is faster than the BLAS library that PyTorch is linked with.

PyTorch gives them to MKL, which reaches half of an AMD processor's peak where oneDNN reaches it; half precision and
convolutions go to oneDNN by themselves. oneDNN comes with PyTorch and reads the weights as they are.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device.quantized import QuantizedMatrix
from ..device.surroundings import plain
from . import measurements

FEW = 32  # rows below which reading the weights is the limit, and not arithmetic
ROWS, INNER, OUTER, ROUNDS = 512, 512, 1024, 5  # what is measured


def onednn() -> Callable[..., Tensor] | None:
    """``linear(x, weight, bias)`` by oneDNN, without a derivative; or ``None`` where this PyTorch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        operator: Any = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
    return lambda x, weight, bias: operator(x, weight, bias, "none", [], "")


def wants_channels_last() -> bool:
    """Whether convolutions are computed by oneDNN on a processor where channels last are no slower: x86 with AVX2.

    Before AVX2 they take up to twice as long; elsewhere nobody has measured.
    """
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@functools.cache
def onednn_is_faster(threads: int) -> bool:
    """Whether oneDNN computes a product of the usual size faster with so many threads.

    Measured once and kept on disk: the two round differently, and where they are about as fast, each process would
    choose for itself.
    """
    by_onednn = onednn()
    if by_onednn is None:
        return False
    machine = f"{measurements.processor()}, {threads} threads, torch {torch.__version__}"
    known = measurements.read(products_file())
    if not isinstance(known.get(machine), bool):
        known[machine] = _measure(by_onednn)
        measurements.write(products_file(), known)
    return known[machine]


def products_file() -> Path:
    """Where it is kept which products oneDNN computes."""
    return measurements.cache_folder() / "products.json"


def _measure(by_onednn: Callable[..., Tensor]) -> bool:
    with plain(), torch.inference_mode(False), torch.no_grad():
        x, weight = (torch.ones(size, INNER, dtype=torch.float32, device="cpu") for size in (ROWS, OUTER))
        try:
            return _least(lambda: by_onednn(x, weight, None)) < 0.9 * _least(lambda: F.linear(x, weight))
        except (RuntimeError, TypeError):  # another signature
            return False


def _least(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def suits(x: Tensor) -> bool:
    """Whether oneDNN is to compute products of ``x``: fp32 on a CPU where that is faster, unless they are autocast."""
    fp32 = x.device.type == "cpu" and x.dtype == torch.float32
    return fp32 and not torch.is_autocast_enabled("cpu") and onednn_is_faster(torch.get_num_threads())


def linear(x: Tensor, weight: Tensor | QuantizedMatrix, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: (…, in) to (…, out), by whatever is faster here; no derivative."""
    if isinstance(weight, QuantizedMatrix):
        return weight.multiply(x, bias)
    if torch.compiler.is_compiling() or x.numel() // x.size(-1) < FEW or not suits(x):
        return F.linear(x, weight, bias)
    return onednn()(x, weight, bias)


def linear_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A ``forward`` for one module: (…, in) to (…, out) by oneDNN; anything but fp32 on a CPU goes the old way.

    So does a call which records a graph.
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
