"""Which scheme a device is good at, and what multiplies by matrices of a scheme there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu.threads import why_no_kernels
from .device import bitsandbytes
from .device.quantized import Multiply, QuantizedMatrix

NATIVE = ("int8", "int4")  # what this package's kernels for CPUs compute
FAST_4BIT = ("cuda", "xpu")  # where bitsandbytes multiplies without making the matrix anew; ROCm is "cuda" to torch


@dataclass(frozen=True)
class Backend:
    """What multiplies: ``multiply(matrix, x)``, x (…, in) to (…, out), or plain torch where there is none.

    Attributes:
        remark: what a report says of it beside its name.
    """

    name: str
    multiply: Multiply | None = None
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.remark})" if self.remark else self.name


TORCH = Backend("torch")


def scheme_for(asked: str, device: torch.device) -> str:
    """The scheme that is meant by ``auto``: four bits, by what has kernels on the device."""
    if asked != "auto":
        return asked
    return "int4" if device.type == "cpu" else "nf4"


def backend_for(scheme: str, asked: str, device: torch.device) -> tuple[Backend, str]:
    """What multiplies by matrices of a scheme on a device, and why that cannot be had or is not advisable."""
    if asked == "torch":
        return TORCH, ""
    if asked == "native":
        return Backend("native", _by_kernels), _why_not_native(scheme, device)
    if asked == "bitsandbytes":
        reason = bitsandbytes.why_not(scheme, device)
        return (TORCH, reason) if reason else (_bitsandbytes(device), "")
    if device.type == "cpu":
        reason = _why_not_native(scheme, device)
        slower = 'quantization.backend = "torch" or "bitsandbytes" computes it all the same, slower than without it'
        return Backend("native", _by_kernels), f"{reason}; {slower}" if reason else ""
    if device.type in FAST_4BIT and scheme in bitsandbytes.SCHEMES:
        reason = bitsandbytes.why_not(scheme, device)
        return (Backend("torch", remark=f"slower than bitsandbytes: {reason}") if reason else _bitsandbytes(device)), ""
    return TORCH, _why_no_bfloat16(device) if scheme in NATIVE else ""


def _why_no_bfloat16(device: torch.device) -> str:
    """Why scales cannot be kept in bf16 on a device."""
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return "its scales are bf16, which MPS has from macOS 14 on; nf4 and fp4 have fp32 ones"
    return ""


@cache
def backend_on(scheme: str, device: torch.device) -> Backend:
    """What multiplies best by matrices that have a scheme already: plain torch where nothing is fast."""
    backend, reason = backend_for(scheme, "auto", device)
    return Backend("torch", remark=reason) if reason else backend


def by_device(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    """``QuantizedMatrix.by`` that goes by where the matrix is, so that a model can be moved to another device."""
    multiply = backend_on(matrix.scheme, matrix.device).multiply
    return F.linear(x, matrix.dequantize(x.dtype)) if multiply is None else multiply(matrix, x)


def _bitsandbytes(device: torch.device) -> Backend:
    remarks = (bitsandbytes.version(), "" if device.type in FAST_4BIT else f"slower on {device.type} than without it")
    return Backend("bitsandbytes", bitsandbytes.multiply_on(device), "; ".join(filter(None, remarks)))


def _by_kernels(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    from .cpu.quantized_linear import quantized_linear  # needs numba

    return quantized_linear(matrix, x)


def _why_not_native(scheme: str, device: torch.device) -> str:
    if scheme not in NATIVE:
        return f"this package's kernels compute {' and '.join(NATIVE)}, not {scheme}"
    if device.type != "cpu":
        return f"this package's kernels run on CPUs, and the model is on {device}"
    return why_no_kernels()
