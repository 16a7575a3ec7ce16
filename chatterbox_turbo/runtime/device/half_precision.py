"""Which half-precision format a device is good at, and casts that can be undone to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")
# by Linux's names, and LLVM's
CPU_FLAGS = {
    "avx512_bf16": "avx512bf16",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "avx512_fp16": "avx512fp16",
}
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
    """Instruction sets of half precision that the processor has: as Linux tells, elsewhere as LLVM finds out."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        found = _features()
        return {flag for flag, name in CPU_FLAGS.items() if found.get(name)}
    flags = next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), [])
    return {flag for flag in CPU_FLAGS if flag in flags}


def _features() -> Mapping[str, bool]:
    """The processor's features, by LLVM's names; nothing where it cannot tell."""
    try:
        from llvmlite.binding import get_host_cpu_features

        return get_host_cpu_features()
    except (ImportError, OSError, RuntimeError):  # its library does not load, or does not know this system
        return {}


@dataclass(frozen=True)
class Remainder:
    """What a cast drops, on the host: called with the cast tensor, it gives the original one back, equal to the bit.

    Attributes:
        kept: the lower 16 bits (int16) of an fp32 tensor whose upper ones are in bf16, or the original itself.
        lower: which of the two.
    """

    kept: Tensor
    lower: bool

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.kept.nbytes

    def __call__(self, half: Tensor) -> Tensor:
        if not self.lower:
            return self.kept.to(half.device)
        upper = half.contiguous().view(torch.int16).to(torch.int32)
        return ((upper << 16) + self.kept.to(half.device)).view(torch.float32)


def cast(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Remainder]:
    """``tensor`` in another format, and what gives ``tensor`` back.

    fp32 to bf16 keeps the lower 16 bits that bf16 drops: together no more memory than before. Ties are
    rounded away from zero instead of to even, which makes the upper half recoverable. Other casts keep the original.
    """
    if (tensor.dtype, dtype) != (torch.float32, torch.bfloat16):
        return tensor.to(dtype), Remainder(tensor.detach().cpu(), lower=False)
    bits = tensor.detach().contiguous().view(torch.int32)
    upper = ((bits + 0x8000) >> 16).to(torch.int16)
    # signed: rounding up is its carry
    return upper.view(torch.bfloat16), Remainder(bits.to(torch.int16).cpu(), lower=True)
