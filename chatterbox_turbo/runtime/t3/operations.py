"""What a decoder layer does between its matrix products, as a small set of operations in plain torch.

``fused.py`` has the same set as Triton kernels. The residual stream is fp32; products are in the weights' format, and
go from one operation to the next without a cast of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.onednn import linear
from ..layers import Linear, Norm
from .kv_cache import KVCache
from .weights import Weights

Watch = Sequence[tuple[int, int]]  # (layer, head) pairs whose attention weights are asked for


class Product(NamedTuple):
    """``values`` (…, out) in the weights' format, and the bias (out,) that whoever reads them has to add, if any."""

    values: Tensor
    bias: Tensor | None = None


class Attention(Protocol):
    """Attention of one new position a row over the cache, for all layers of one step."""

    def __call__(self, layer: int, qkv: Product) -> Tensor:
        """Append (R, 3 D), queries, keys and values one beside the other, to the cache; attend: (R, D)."""

    def watched(self) -> Tensor | None:
        """Attention (R, capacity) fp32 of the new position, averaged over the watched heads, if there are any."""


@dataclass(frozen=True)
class Operations:
    """One implementation of everything.

    Attributes:
        product: matrix (out, in), hidden states (…, in) in its format → ``Product``.
        add_norm: residual (…, D) fp32, the product to add to it or ``None``, norm, format → the sum, and its norm in
            that format.
        activate: product (…, 2 F) gated by SiLU, or (…, F) through GELU (tanh) → (…, F) in the product's format.
        attention: weights, cache, positions filled before this one (R,) int64, capacity, watched heads → ``Attention``.
    """

    product: Callable[[Linear, Tensor], Product]
    add_norm: Callable[[Tensor, Product | None, Norm, torch.dtype], tuple[Tensor, Tensor]]
    activate: Callable[[Product, bool], Tensor]
    attention: Callable[[Weights, KVCache, Tensor, int, Watch], Attention]


def product(matrix: Linear, x: Tensor) -> Product:
    """A product with its bias, where both have one format."""
    if matrix.bias is None or matrix.bias.dtype == matrix.weight.dtype:
        return Product(linear(x, matrix.weight, matrix.bias))
    return Product(linear(x, matrix.weight), matrix.bias)


def add_norm(x: Tensor, y: Product | None, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual after an addition, and its RMSNorm or LayerNorm, computed in fp32."""
    if y is not None:
        x = x + y.values if y.bias is None else x + y.values + y.bias
    weight = norm.weight.float()
    if norm.bias is None:
        return x, F.rms_norm(x, (x.size(-1),), weight, norm.eps).to(dtype)
    return x, F.layer_norm(x, (x.size(-1),), weight, norm.bias.float(), norm.eps).to(dtype)


def activate(y: Product, gated: bool) -> Tensor:
    """The activation of an MLP, computed in fp32."""
    x = y.values.float() if y.bias is None else y.values.float() + y.bias.float()
    if gated:
        gate, up = x.chunk(2, dim=-1)
        return (F.silu(gate) * up).to(y.values.dtype)
    return F.gelu(x, approximate="tanh").to(y.values.dtype)


def turning(cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (…, Dh / 2) as ``rotate`` multiplies with them: (…, 1, 1, Dh)."""
    return torch.cat([cosines, cosines], -1)[..., None, None, :], torch.cat([-sines, sines], -1)[..., None, None, :]


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of (…, n, H, Dh); component i turns with component i + Dh / 2 (RoFormer, 2021)."""
    return torch.addcmul(x * turn[0], x.roll(x.size(-1) // 2, -1), turn[1])


def split_heads(qkv: Product, heads: int, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Products (…, 3 D) to queries, keys and values (…, H, Dh), turned where ``turn`` says by how much."""
    values = qkv.values if qkv.bias is None else qkv.values + qkv.bias
    three = values.unflatten(-1, (3, heads, -1))
    if turn is None:
        return three.unbind(dim=-3)
    q, k = rotate(three[..., :2, :, :], turn).unbind(dim=-3)
    return q, k, three[..., 2, :, :]


class PlainAttention:
    """By torch's own kernel, with one mask for all layers."""

    def __init__(self, weights: Weights, cache: KVCache, lengths: Tensor, capacity: int, watch: Watch):
        self._heads, self._cache, self._lengths, self._capacity, self._watch = (
            weights.heads, cache, lengths, capacity, watch,
        )  # fmt: skip
        self._rows = torch.arange(lengths.size(0), device=lengths.device)
        self._hidden = torch.arange(capacity, device=lengths.device) > lengths[:, None]
        # numbers: torch would make them of bools in every layer
        mask = torch.zeros(self._hidden.shape, dtype=cache.keys.dtype, device=lengths.device)
        self._mask = mask.masked_fill_(self._hidden, -float("inf"))[:, None, None]
        turn = weights.rotary(lengths)
        self._turn = None if turn is None else turning(*turn)
        self._seen: list[Tensor] = []

    def __call__(self, layer: int, qkv: Product) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        q, k, v = (one.to(keys.dtype) for one in split_heads(qkv, self._heads, self._turn))
        keys[self._rows, :, self._lengths] = k
        values[self._rows, :, self._lengths] = v
        rows = self._rows.size(0)
        keys, values = keys[:rows, :, : self._capacity], values[:rows, :, : self._capacity]
        for head in (h for index, h in self._watch if index == layer):
            scores = (keys[:, head].float() @ q[:, head, :, None].float())[..., 0] * q.size(-1) ** -0.5
            self._seen.append(scores.masked_fill(self._hidden, -float("inf")).softmax(dim=-1))
        attended = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=self._mask)
        return attended.flatten(1).to(qkv.values.dtype)

    def watched(self) -> Tensor | None:
        return torch.stack(self._seen).mean(dim=0) if self._seen else None


PLAIN = Operations(product, add_norm, activate, PlainAttention)
