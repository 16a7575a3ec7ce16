"""Prefill and single-token step of a Llama or GPT-2, in plain torch over given weights and a given cache.

Independent of Transformers, whose caches and masks change from release to release. The residual stream is fp32,
matrix products run in the weights' own format, attention in the cache's (the prefill's on a CPU in fp32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.onednn import linear
from ..layers import Linear, Norm
from .kv_cache import KVCache
from .weights import Weights

Watch = Sequence[tuple[int, int]]  # (layer, head) pairs whose attention weights are asked for


def prefill(weights: Weights, cache: KVCache, embeds: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Append sequences to the cache: embeddings (R, P, D) to logits (R, V) fp32 of the last position.

    The R sequences become the last rows in use. ``lengths``: positions of each, where behind them is padding; no
    position sees what is behind it, so that nothing has to be masked.
    """
    rows, length, _ = embeds.shape
    first = cache.rows
    for one in lengths or [length] * rows:
        cache.append(1, one)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        cache.keys[layer, first : first + rows, :, :length] = k
        cache.values[layer, first : first + rows, :, :length] = v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    positions = torch.arange(length, device=embeds.device)
    # kernels for CPUs are slower in half precision
    dtype = torch.float32 if embeds.device.type == "cpu" else cache.keys.dtype
    hidden = _run(weights, embeds, positions, dtype, attend)
    last = cache.device_lengths[first : first + rows] - 1
    return _logits(weights, hidden[torch.arange(rows, device=embeds.device), last])


def decode_step(
    weights: Weights, cache: KVCache, embeds: Tensor, lengths: Tensor, capacity: int, watch: Watch = ()
) -> tuple[Tensor, Tensor | None]:
    """One position more in each of the first R rows; the lengths are left to the caller, so it can be repeated.

    No host sync and no shape that depends on values: it can be captured in a CUDA graph.

    Args:
        embeds: (R, D).
        lengths: (R,) int64, positions filled before this one.
        capacity: attention runs over so many positions, more than every length.
        watch: heads whose attention is averaged.

    Returns:
        logits (R, V) fp32, and with ``watch`` attention (R, capacity) fp32 of the new position.
    """
    rows = torch.arange(embeds.size(0), device=embeds.device)
    allowed = torch.arange(capacity, device=embeds.device) <= lengths[:, None]
    seen: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        keys[rows, :, lengths] = k[:, 0]
        values[rows, :, lengths] = v[:, 0]
        keys, values = keys[: rows.size(0), :, :capacity], values[: rows.size(0), :, :capacity]
        for head in (h for index, h in watch if index == layer):
            seen.append(_weights(q[:, :, head], keys[:, head], ~allowed[:, None])[:, 0])
        mask = allowed[:, None, None]
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)

    hidden = _run(weights, embeds[:, None], lengths[:, None], cache.keys.dtype, attend)[:, 0]
    return _logits(weights, hidden), torch.stack(seen).mean(dim=0) if seen else None


def _run(
    weights: Weights,
    embeds: Tensor,
    positions: Tensor,
    attention_dtype: torch.dtype,
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Embeddings (R, S, D) through all layers: hidden states (R, S, D) fp32 before the final norm.

    ``attend`` gets the layer's index and q, k, v (R, S, H, Dh), and returns (R, S, H, Dh).
    """
    x = embeds.float()
    if weights.positions is not None:
        x = x + weights.positions[positions].float()
    turn = weights.rotary(positions)
    for index, layer in enumerate(weights.layers):
        qkv = project(layer.qkv, normalize(layer.attention_norm, x))
        q, k, v = qkv.unflatten(-1, (3, weights.heads, weights.head_width)).unbind(dim=2)
        if turn is not None:
            q, k = _rotate(q, *turn), _rotate(k, *turn)
        attended = attend(index, q.to(attention_dtype), k.to(attention_dtype), v.to(attention_dtype))
        x = x + project(layer.out, attended.flatten(2))
        x = x + project(layer.down, _activate(weights.gated, project(layer.up, normalize(layer.mlp_norm, x))))
    return x


def project(matrix: Linear, x: Tensor) -> Tensor:
    """(…, in) to (…, out) fp32, computed in the weights' format."""
    weight, bias = matrix.weight, matrix.bias
    if bias is None or bias.dtype == weight.dtype:
        return linear(x.to(weight.dtype), weight, bias).float()
    return linear(x.to(weight.dtype), weight).float() + bias.float()


def normalize(norm: Norm, x: Tensor) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension, in fp32."""
    weight = norm.weight.float()
    if norm.bias is None:
        return F.rms_norm(x, (x.size(-1),), weight, norm.eps)
    return F.layer_norm(x, (x.size(-1),), weight, norm.bias.float(), norm.eps)


def _logits(weights: Weights, hidden: Tensor) -> Tensor:
    return project(weights.head, normalize(weights.final_norm, hidden))


def _activate(gated: bool, x: Tensor) -> Tensor:
    if not gated:
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of (R, S, H, Dh); component i turns with component i + Dh / 2 (RoFormer, 2021)."""
    cosines, sines = cosines[..., None, :], sines[..., None, :]
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], dim=-1)


def _weights(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """Attention weights (…, T, C) fp32 of queries (…, T, Dh) over keys (…, C, Dh); none where ``hidden``."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.size(-1) ** -0.5
    return scores.masked_fill(hidden, -float("inf")).softmax(dim=-1)
