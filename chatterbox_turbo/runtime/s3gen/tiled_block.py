"""The flow's transformer blocks by ``cpu.tile_products``, on processors that have AMX."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu.threads import kernel_threads, why_no_kernels
from ..layers import Linear, Norm
from .scratch import Scratch

FEWEST = 32  # rows


@dataclass(frozen=True)
class Block:
    """One pre-norm transformer block with full attention and an MLP with GELU."""

    attention_norm: Norm
    qkv: Linear  # (3 H Dh, C), no bias
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear


def suits(block: Block, x: Tensor) -> bool:
    """Whether a block is computed so: bf16, x (R, T, C) fp32 on a CPU with AMX, sizes that fill tiles."""
    weights = [linear.weight for linear in (block.qkv, block.out, block.up, block.down)]
    if torch.compiler.is_compiling() or x.device.type != "cpu" or weights[0].dtype != torch.bfloat16:
        return False
    if x[..., 0].numel() < FEWEST or any(size % FEWEST for weight in weights for size in weight.shape):
        return False
    if block.out.bias is None or block.up.bias is None or block.down.bias is None or why_no_kernels():
        return False
    from ..cpu.tiles import multiplies_tiles

    return multiplies_tiles()


def queries_keys_values(block: Block, x: Tensor, scratch: Scratch) -> Tensor:
    """(R, T, 3 H Dh) bf16 of x (R, T, C) fp32; memory of ``scratch``."""
    from ..cpu import tile_products as kernels

    rows, outputs = x[..., 0].numel(), block.qkv.weight.size(0)
    result = scratch("queries, keys, values", (*x.shape[:2], outputs), torch.bfloat16)
    with kernel_threads():
        weight = _packed("qkv", block.qkv.weight, scratch)
        y = result.view(torch.int16).view(rows, outputs).numpy()
        kernels.normalize_and_multiply(x.reshape(rows, -1).numpy(), *_norm(block.attention_norm), weight, y)
    return result


def finish(block: Block, x: Tensor, attended: Tensor, scratch: Scratch) -> Tensor:
    """(R, T, C) fp32: what the block makes of x and what its queries have attended to (R, T, H Dh) bf16."""
    from ..cpu import tile_products as kernels

    rows, y = x[..., 0].numel(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with kernel_threads():
        out, up, down = (_linear(name, getattr(block, name), scratch) for name in ("out", "up", "down"))
        values = attended.contiguous().view(torch.int16).view(rows, -1).numpy()
        before, after = x.reshape(rows, -1).numpy(), y.view(rows, -1).numpy()
        kernels.finish(values, before, out, _norm(block.mlp_norm), up, down, after)
    return y


def prepare(blocks: Iterable[Block]) -> None:
    """Compile what a block needs: seconds where no process has done it before."""
    block = next(iter(blocks), None)
    if block is None or block.out.weight.device.type != "cpu":
        return
    x = torch.zeros(1, FEWEST, block.out.weight.size(0))
    if suits(block, x):
        scratch = Scratch()
        parts = queries_keys_values(block, x, scratch)
        finish(block, x, parts[..., : block.out.weight.size(1)], scratch)


def _packed(name: str, weight: Tensor, scratch: Scratch) -> Any:
    from ..cpu import tile_products as kernels

    outputs, inputs = weight.shape
    packed = scratch(f"packed {name}", (outputs // kernels.ROWS, inputs // 2, kernels.ROWS), torch.int32).numpy()
    kernels.pack(weight.detach().contiguous().view(torch.int32).numpy(), packed)
    return packed


def _linear(name: str, linear: Linear, scratch: Scratch) -> tuple[Any, Any]:
    return _packed(name, linear.weight, scratch), linear.bias.detach().float().numpy()


def _norm(norm: Norm) -> tuple[Any, Any, float]:
    return norm.weight.detach().float().numpy(), norm.bias.detach().float().numpy(), np.float32(norm.eps)
