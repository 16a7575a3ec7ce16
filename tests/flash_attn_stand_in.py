"""flash-attn's two functions as their signatures are in 2.8, computed by torch's attention: what a call has to hold.

It refuses what its kernels refuse: other formats, other widths, ends that are not int32.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def stand_in() -> ModuleType:
    """A module to put into ``sys.modules["flash_attn"]``.

    Its ``calls`` has an entry for each call: ("whole" or "several", the shape of the queries, causal).
    """
    module = ModuleType("flash_attn")
    module.__version__, module.calls = "2.8.3", []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        _check(q, k, v, 4)
        module.calls.append(("whole", tuple(q.shape), causal))
        return _attended(q, k, v, softmax_scale, causal, None)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        _check(q, k, v, 3)
        for ends in (cu_seqlens_q, cu_seqlens_k):
            if ends.dtype != torch.int32 or ends.dim() != 1 or not ends.is_contiguous() or ends.device != q.device:
                raise RuntimeError("cu_seqlens must be contiguous int32 on the device of the queries")
        if not isinstance(max_seqlen_q, int) or not isinstance(max_seqlen_k, int):
            raise TypeError("max_seqlen must be an int")
        module.calls.append(("several", tuple(q.shape), causal))
        positions = torch.arange(q.size(0), device=q.device, dtype=torch.int32)
        # which sequence each position is of; those of no length are passed over
        sequence = torch.searchsorted(cu_seqlens_q, positions, right=True)
        apart = sequence[:, None] != sequence[None, :]
        hidden = torch.zeros(apart.shape, dtype=q.dtype, device=q.device).masked_fill(apart, -float("inf"))
        return _attended(q[None], k[None], v[None], softmax_scale, causal, hidden)[0]

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def _check(q: Tensor, k: Tensor, v: Tensor, dimensions: int) -> None:
    for one in (q, k, v):
        if one.device.type != "cuda":
            raise RuntimeError("FlashAttention only supports CUDA tensors")
        if one.dtype not in _HALF or one.dtype != q.dtype:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if one.dim() != dimensions or one.shape != q.shape:
            raise RuntimeError(f"expected {dimensions} dimensions and equal shapes, got {tuple(one.shape)}")
        if one.stride(-1) != 1:
            raise RuntimeError("Input tensor must have contiguous last dimension")
        if one.size(-1) % 8 or one.size(-1) > 256:
            raise RuntimeError("FlashAttention forward only supports head dimension at most 256, a multiple of 8")


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, hidden: Tensor | None) -> Tensor:
    """(R, T, H, Dh), as its inputs."""
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    if causal and hidden is not None:
        raise NotImplementedError("no caller asks for several causal sequences")
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, is_causal=causal, scale=scale)
    return attended.transpose(1, 2).contiguous()
