"""Products of nf4 and fp4 matrices by bitsandbytes' kernels, over the codes and scales that lie here anyway.

Its operators take a matrix as bytes, scales and shape, which is how ``QuantizedMatrix`` holds it: nothing is copied,
packed anew or kept beside it, so that a matrix that moves takes all there is with it. What its releases have:

- before 0.46: no operators in ``torch.library``. Not used.
- 0.46 to 0.49: ``gemv_4bit`` multiplies one row, on CUDA and ROCm, from 0.47 on XPU. Several rows need the matrix in
  full (``dequantize_4bit``). On CPUs it makes the matrix always, of fp4 from 0.47.
- from 0.50: ``gemm_4bit`` on CUDA multiplies up to 4 rows, and by its own tables for each GPU and shape up to 1536,
  without making the matrix; on ROCm up to 4 (fp32: 2), on RDNA 8. On XPU and MPS it does so for one row, on CPUs never.

All take fp16, bf16 and fp32 rows; fp32 sums. The CUDA operators allocate from torch's pool alone, launch on the current
stream and do not wait (read in 0.46 and 0.50), as captured steps need. Nothing of this ran on a GPU: the lines here are
tested with its kernels for CPUs, also on simulated CUDA tensors.

Its int8 products are not used. They need a scale a row of the matrix, fp16 on CUDA, and activations in 8 bits as well:
against float64 39 dB where weights in groups of 128 alone give 44, and 27 instead of 44 where 6 of 1024 inputs are 20
times as large. Taking these out (its threshold) gives 41, and waits for the GPU, which a captured step may not.

On a CPU with AVX512-BF16 releases from 0.49 have a faster product, over a layout of their own: not used, since codes
would lie in memory twice.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized import Multiply, QuantizedMatrix, table_on
from .rounding import quantize

NAME = "bitsandbytes"
SCHEMES = ("nf4", "fp4")
INSTALL = 'pip install "chatterbox-turbo[quantization]"'
OLDEST, FUSED = (0, 46), (0, 50)
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
# a product of one row reads half a byte a weight; making the matrix in bf16 and multiplying by it moves 4.5
SPLIT = 4


def version() -> str:
    """Of the package that is installed."""
    return str(_module().__version__)


def why_not(scheme: str, device: torch.device) -> str:
    """Why it does not multiply by matrices of a scheme on a device; empty where it does. Computes a small product."""
    if scheme == "int8":
        return (
            "bitsandbytes' int8 products round activations to 8 bits too and wait for the GPU where some are large, "
            'which a captured step may not; backend "torch" has int8'
        )
    if scheme not in SCHEMES:
        return f"bitsandbytes computes {' and '.join(SCHEMES)}, not {scheme}"
    try:
        found = version()
    except ModuleNotFoundError as error:
        if error.name != NAME:
            return f"bitsandbytes cannot be imported: {error}"
        return f"bitsandbytes is not installed: {INSTALL}"
    except Exception as error:  # its library's, its plugins'
        return f"bitsandbytes cannot be imported: {_first_line(error)}"
    if _numbers(found) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"bitsandbytes {found} is too old, {oldest} is the oldest that is used: {INSTALL} --upgrade"
    key = {"cuda": "CUDA", "cpu": "CPU", "xpu": "XPU", "mps": "MPS"}.get(device.type, "PrivateUse1")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::dequantize_4bit", key):
        return f"bitsandbytes {found} has no kernels for {device.type} on this machine: python -m bitsandbytes says why"
    return _why_wrong(scheme, device, found)


def multiply_on(device: torch.device) -> Multiply:
    """What multiplies best on a device with the release that is installed, for ``QuantizedMatrix.by``."""
    return multiply if _numbers(version()) >= FUSED and device.type != "xpu" else multiply_rows


def multiply(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    """(…, in) to (…, out) by ``gemm_4bit``, which itself makes the matrix where that is faster."""
    if not _computes(x):
        return F.linear(x, matrix.dequantize(x.dtype))
    return torch.ops.bitsandbytes.gemm_4bit.default(x, *_operands(matrix))


def multiply_rows(matrix: QuantizedMatrix, x: Tensor) -> Tensor:
    """(…, in) to (…, out): a few rows one by one by ``gemv_4bit``, many by the matrix in full."""
    if not _computes(x):
        return F.linear(x, matrix.dequantize(x.dtype))
    codes, shape, scales, group, scheme = _operands(matrix)
    operators = torch.ops.bitsandbytes
    rows = x.reshape(-1, x.size(-1)).contiguous()
    # on CPUs gemv_4bit expects another layout (0.49)
    if rows.size(0) <= SPLIT and x.device.type != "cpu":
        table = table_on(scheme, codes.device)
        each = [operators.gemv_4bit.default(row, codes, shape, scales, table, group) for row in rows.split(1)]
        y = each[0] if len(each) == 1 else torch.cat(each)
    else:
        y = F.linear(rows, operators.dequantize_4bit.default(codes, scales, group, scheme, shape, x.dtype))
    return y.view(*x.shape[:-1], y.size(-1))


def _computes(x: Tensor) -> bool:
    """Whether its kernels do: some return what lay in memory for other formats, and none has a gradient."""
    return x.dtype in FORMATS and x.numel() > 0 and not (x.requires_grad and torch.is_grad_enabled())


def _operands(matrix: QuantizedMatrix) -> tuple[Tensor, torch.Size, Tensor, int, str]:
    """Codes, shape, scales, inputs a scale, scheme; its kernels go by addresses, some by bitsandbytes' own shapes."""
    shape = matrix.shape
    group = shape[1] // matrix.scales.size(1)
    return matrix.codes.reshape(-1, 1), shape, matrix.scales.reshape(-1), group, matrix.scheme


def _why_wrong(scheme: str, device: torch.device, found: str) -> str:
    """Why a product for one row or two fails, or is none of the matrix that is meant."""
    matrix = quantize(torch.linspace(-1, 1, 4096, device=device).view(32, 128), scheme)
    by = multiply_on(device)
    for rows in (1, 2):
        x = torch.ones(rows, 128, device=device)
        try:
            y = by(matrix, x)
        except Exception as error:
            return f"bitsandbytes {found} cannot multiply {scheme} on {device.type}: {_first_line(error)}"
        if not torch.allclose(y, F.linear(x, matrix.dequantize()), atol=0.05):
            return f"bitsandbytes {found} reads {scheme} differently on {device.type}: its products are wrong"
    return ""


def _module() -> ModuleType:
    # takes seconds, and loads a library for the GPU
    return importlib.import_module(NAME)


def _numbers(found: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", found)[:2])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
