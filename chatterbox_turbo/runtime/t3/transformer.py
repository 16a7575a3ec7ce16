"""Prefill and single-token step of a Llama or GPT-2, over given weights, a given cache and a set of operations.

Independent of Transformers, whose caches and masks change from release to release. The residual stream is fp32,
matrix products run in the weights' own format, attention in the cache's (the prefill's on a CPU in fp32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device.attention_kernels import Kernel
from .kv_cache import KVCache
from .operations import PLAIN, Operations, Product, Watch, split_heads, turning
from .voice_prefixes import VoicePrefix
from .weights import Weights


def prefill(
    weights: Weights,
    cache: KVCache,
    embeds: Tensor,
    lengths: Sequence[int] | None = None,
    kernel: Kernel | None = None,
    before: Sequence[VoicePrefix] = (),
) -> Tensor:
    """Append sequences to the cache: embeddings (R, P, D) to logits (R, V) fp32 of the last position.

    The R sequences become the last rows in use. ``lengths``: positions of each, where behind them is padding; no
    position sees what is behind it, so that nothing has to be masked. ``kernel``: of attention; without it torch's
    choice. ``before``: what stands before each, all of one length, computed already; ``kernel`` is not asked then.
    """
    rows, length, _ = embeds.shape
    first, begin = cache.rows, before[0].length if before else 0
    for one in lengths or [length] * rows:
        cache.append(1, begin + one)
    for row, one in enumerate(before, first):
        cache.keys[:, row, :, :begin], cache.values[:, row, :, :begin] = one.keys, one.values
    end = begin + length
    positions = torch.arange(begin, end, device=embeds.device)
    turn = weights.rotary(positions)
    turn = None if turn is None else turning(*turn)
    dtype = prefill_format(cache.keys.dtype, embeds.device)
    seen = positions[:, None] >= torch.arange(end, device=embeds.device) if before else None

    def attend(layer: int, qkv: Product) -> Tensor:
        q, k, v = (one.to(dtype).transpose(1, 2) for one in split_heads(qkv, weights.heads, turn))
        cache.keys[layer, first : first + rows, :, begin:end] = k
        cache.values[layer, first : first + rows, :, begin:end] = v
        if before:
            k, v = (
                torch.cat([all_of[layer, first : first + rows, :, :begin].to(dtype), one], dim=2)
                for all_of, one in ((cache.keys, k), (cache.values, v))
            )
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        elif kernel is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            attended = kernel(q, k, v, causal=True)
        return attended.transpose(1, 2).flatten(2).to(qkv.values.dtype)

    last = cache.device_lengths[first : first + rows] - begin - 1
    chosen = torch.arange(rows, device=embeds.device), last
    return _run(weights, embeds, positions, attend, PLAIN, lambda x: x[chosen])


def prefill_format(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The format in which the prefill attends, where keys and values are kept in ``dtype``."""
    # kernels for CPUs are slower in half precision
    return torch.float32 if device.type == "cpu" else dtype


def decode_step(
    weights: Weights,
    cache: KVCache,
    embeds: Tensor,
    lengths: Tensor,
    capacity: int,
    watch: Watch = (),
    operations: Operations = PLAIN,
) -> tuple[Tensor, Tensor | None]:
    """One position more in each of the first R rows; the lengths are left to the caller, so it can be repeated.

    No host sync and no shape that depends on values: it can be captured in a CUDA graph.

    Args:
        embeds: (R, D).
        lengths: (R,) int64, positions filled before this one.
        capacity: attention runs over so many positions, more than every length.
        watch: heads whose attention is averaged.
        operations: plain torch, or fused kernels.

    Returns:
        logits (R, V) fp32, and with ``watch`` attention (R, capacity) fp32 of the new position.
    """
    attention = operations.attention(weights, cache, lengths, capacity, watch)
    return _run(weights, embeds, lengths, attention, operations), attention.watched()


def _run(
    weights: Weights,
    embeds: Tensor,
    positions: Tensor,
    attend: Callable[[int, Product], Tensor],
    operations: Operations,
    choose: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Embeddings (…, D) through all layers and the head: logits (…, V) fp32 of what ``choose`` keeps of the last."""
    product, add_norm, dtype = operations.product, operations.add_norm, weights.dtype
    x, y = embeds.float(), None
    if weights.positions is not None:
        x = x + weights.positions[positions]
    for index, layer in enumerate(weights.layers):
        x, h = add_norm(x, y, layer.attention_norm, dtype)
        y = product(layer.out, attend(index, product(layer.qkv, h)))
        x, h = add_norm(x, y, layer.mlp_norm, dtype)
        y = product(layer.down, operations.activate(product(layer.up, h), weights.gated))
    x, y = choose(x), Product(choose(y.values), y.bias)
    _, h = add_norm(x, y, weights.final_norm, weights.head.weight.dtype)
    logits = product(weights.head, h)
    return logits.values.float() if logits.bias is None else logits.values.float() + logits.bias.float()
