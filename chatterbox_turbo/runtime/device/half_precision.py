"""Which half-precision format a device is good at, and casts that can be undone to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CPU_FLAGS = ("avx512_bf16", "amx_bf16", "amx_int8", "avx512_fp16")
FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def best_format(device: torch.device) -> tuple[str, str]:
    """The half-precision format that makes this device faster, or an empty string; and the reason.

    ``torch.cuda.is_bf16_supported()`` is true on Turing, where bf16 is emulated and slower than fp32; older cards
    compute fp16 at a fraction of the speed of fp32.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bfloat16", f"capability {major}.{minor}"
        if (major, minor) >= (7, 0):
            return "float16", f"capability {major}.{minor}"
        return "", f"half precision needs capability 7.0, this GPU has {major}.{minor}"
    if device.type == "cpu":
        flags = cpu_flags() & {"avx512_bf16", "amx_bf16"}
        if flags:
            return "bfloat16", ", ".join(sorted(flags))
        return "", "half precision needs AVX-512-BF16 or AMX, this processor has neither"
    return "", f"half precision has not been tried on {device.type}"


def cpu_flags() -> set[str]:
    """Instruction sets of half precision that the processor has (Linux; elsewhere empty)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    flags = next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), [])
    return {flag for flag in CPU_FLAGS if flag in flags}


def cast(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``tensor`` in another format, and a function from that back to ``tensor``, equal to the bit.

    fp32 to bf16 keeps the lower 16 bits that bf16 drops, on the host: together no more memory than before. Ties are
    rounded away from zero instead of to even, which makes the upper half recoverable. Other casts keep the original
    on the host.
    """
    if (tensor.dtype, dtype) != (torch.float32, torch.bfloat16):
        original = tensor.detach().cpu()
        return tensor.to(dtype), lambda half: original.to(half.device)
    bits = tensor.detach().contiguous().view(torch.int32)
    upper = ((bits + 0x8000) >> 16).to(torch.int16)
    lower = bits.to(torch.int16).cpu()  # signed: rounding up is its carry

    def restore(half: Tensor) -> Tensor:
        upper = half.contiguous().view(torch.int16).to(torch.int32)
        return ((upper << 16) + lower.to(half.device)).view(torch.float32)

    return upper.view(torch.bfloat16), restore
