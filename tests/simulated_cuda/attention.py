"""CUDA's attention operators: what each refuses, and its values by the CPU's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

on_host = F.scaled_dot_product_attention
HALF = (torch.float16, torch.bfloat16)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False, *,
    scale: float | None = None,
) -> tuple:  # fmt: skip
    _half("FlashAttention", q, k, v)
    attended, lse, counter = _values(q, k, v, None, causal, scale)
    return attended, lse, None, None, q.size(2), k.size(2), counter, counter.clone(), attended.new_empty(0)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, dropout: float = 0.0, causal: bool = False, *,
    scale: float | None = None,
) -> tuple:  # fmt: skip
    _aligned(q, bias)
    attended, lse, counter = _values(q, k, v, bias, causal, scale)
    return attended, lse, counter, counter.clone()


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> tuple:  # fmt: skip
    _half("cuDNN attention", q, k, v)
    attended, lse, counter = _values(q, k, v, bias, causal, scale)
    return attended, lse, None, None, q.size(2), k.size(2), counter, counter.clone(), attended.new_empty(0)


OPERATORS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_cudnn_attention": _cudnn,
}


def _half(what: str, *operands: Tensor) -> None:
    if any(one.dtype not in HALF for one in operands):
        raise RuntimeError(f"{what} only supports fp16 and bf16 data type")


def _aligned(q: Tensor, bias: Tensor | None) -> None:
    """What the efficient kernel asks of scores that are added: one for each query, rows 16 bytes apart or broadcast."""
    if bias is None:
        return
    if bias.dim() != 4 or bias.dtype != q.dtype or bias.shape[:3] != q.shape[:3]:
        raise RuntimeError(f"invalid shape or format for attention bias: {tuple(bias.shape)} {bias.dtype}")
    if any(step * bias.element_size() % 16 for step in bias.stride()[:3]):
        raise RuntimeError("attn_bias is not correctly aligned (strides)")


def _values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> tuple:
    """Attended values, laid out as CUDA's kernels do: (R, T, H, Dh) in memory; the sums, not computed; a counter."""
    attended = on_host(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    laid = attended.transpose(1, 2).contiguous().transpose(1, 2)
    return laid, q.new_empty(0, dtype=torch.float32), torch.zeros((), dtype=torch.int64)
