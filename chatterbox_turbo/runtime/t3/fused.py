"""The operations of ``operations.py`` as Triton kernels: nine kernels a layer, products included.

Each kernel is an operator of torch, so that whatever counts, traces or compiles operations sees one. On a CPU the
operators run plain torch; nothing but tests asks them to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.quantized import QuantizedMatrix
from ..layers import Linear, Norm
from . import operations as plain
from . import triton_kernels as kernels  # first of all: where it cannot be imported, nothing is defined
from .kv_cache import KVCache
from .operations import Operations, Product, Watch
from .weights import Weights

PROGRAMS = 128  # of attention, at least: about one for each multiprocessor of a large card
LEAST_POSITIONS = 64  # of the cache's capacity, in each part of an attention
PARTS = 8  # of an attention, at most

_library = torch.library.Library("chatterbox_turbo", "DEF")
_library.define("norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor")
_library.define(
    "add_norm(Tensor x, Tensor y, Tensor? y_bias, Tensor weight, Tensor? bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor)"
)
_library.define("activate(Tensor y, Tensor? bias, bool gated) -> Tensor")
_library.define(
    "attend(Tensor qkv, Tensor? bias, Tensor? cosines, Tensor? sines, Tensor(a!) keys, Tensor(b!) values,"
    " Tensor lengths, Tensor(c!) out, Tensor(d!)? scores, Tensor? slots) -> ()"
)
_library.define("combine(Tensor parts, Tensor(a!) out) -> ()")


def unsuitable(weights: Weights) -> str:
    """Why the kernels cannot run these weights, or an empty string."""
    width = weights.head_width
    if width & (width - 1) or width < 32:
        return f"heads are {width} wide, not a power of two"
    if len({matrix.dtype for matrix in weights.matrices()}) > 1:
        return "the matrices have several formats"
    if weights.device.type == "cuda":
        found, needed = torch.cuda.get_device_capability(weights.device), (7, 0)
        if weights.dtype == torch.bfloat16:
            needed = (8, 0)
        if found < needed:
            return f"{weights.dtype} needs capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"
    return ""


def product(matrix: Linear, x: Tensor) -> Product:
    """A product without its bias, which the kernel that reads it adds in fp32."""
    if isinstance(matrix.weight, QuantizedMatrix):
        return Product(matrix.weight.multiply(x), matrix.bias)
    return Product(x @ matrix.weight.t(), matrix.bias)


def add_norm(x: Tensor, y: Product | None, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if y is None:
        return x, torch.ops.chatterbox_turbo.norm(x, norm.weight, norm.bias, norm.eps, dtype)
    return torch.ops.chatterbox_turbo.add_norm(x, y.values, y.bias, norm.weight, norm.bias, norm.eps, dtype)


def activate(y: Product, gated: bool) -> Tensor:
    return torch.ops.chatterbox_turbo.activate(y.values, y.bias, gated)


class FusedAttention:
    """Rotary embedding, the cache's write and attention in one launch; a second one adds up the parts of long ones."""

    def __init__(self, weights: Weights, cache: KVCache, lengths: Tensor, capacity: int, watch: Watch):
        self._cache, self._lengths, self._watch = cache, lengths, watch
        self._turn = weights.rotary(lengths) or (None, None)
        self._parts = parts(lengths.size(0) * weights.heads, capacity)
        shape = (len(watch), lengths.size(0), capacity)
        # what is not written is beyond a row's length
        self._scores = torch.full(shape, -float("inf"), dtype=torch.float32, device=lengths.device) if watch else None

    def __call__(self, layer: int, qkv: Product) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        (_, heads, _, width), rows = keys.shape, self._lengths.size(0)
        out = qkv.values.new_empty(rows, heads * width)
        several = out.new_empty((rows, heads, self._parts, width + 2), dtype=torch.float32) if self._parts > 1 else out
        slots = self._slots(layer, heads)
        scores = None if slots is None else self._scores
        operators = torch.ops.chatterbox_turbo
        operators.attend(*qkv, *self._turn, keys, values, self._lengths, several, scores, slots)
        if self._parts > 1:
            operators.combine(several, out)
        return out

    def _slots(self, layer: int, heads: int) -> Tensor | None:
        """(H,) int64: where in the scores a head's are kept, -1 where they are not; made without a copy."""
        mine = [(head, slot) for slot, (index, head) in enumerate(self._watch) if index == layer]
        if not mine:
            return None
        slots = torch.full((heads,), -1, dtype=torch.long, device=self._lengths.device)
        for head, slot in mine:
            slots[head] = slot
        return slots

    def watched(self) -> Tensor | None:
        return None if self._scores is None else self._scores.softmax(dim=-1).mean(dim=0)


def parts(programs: int, capacity: int) -> int:
    """A power of two: so many that a GPU has work for all of its multiprocessors, and each part some positions."""
    number = 1
    while number < PARTS and programs * number < PROGRAMS and capacity >= 2 * number * LEAST_POSITIONS:
        number *= 2
    return number


FUSED = Operations(product, add_norm, activate, FusedAttention)


# -- on CUDA: the kernels ------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    h = x.new_empty(x.shape, dtype=dtype)
    with torch.cuda.device(x.device):
        kernels.add_norm(x, None, None, weight, bias, eps, h)
    return h


def _add_norm(
    x: Tensor, y: Tensor, y_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.shape, dtype=dtype)
    with torch.cuda.device(x.device):
        return kernels.add_norm(x, y, y_bias, weight, bias, eps, h), h


def _activate(y: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    with torch.cuda.device(y.device):
        return kernels.activate(y, bias, gated)


def _attend(qkv: Tensor, *rest: Tensor | None) -> None:
    with torch.cuda.device(qkv.device):
        kernels.attend(qkv, *rest)


def _combine(several: Tensor, out: Tensor) -> None:
    with torch.cuda.device(out.device):
        kernels.combine(several, out)


# -- on a CPU: the same by plain torch -----------------------------------------------------------------------


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return plain.add_norm(x, None, Norm(weight, bias, eps), dtype)[1].clone()


def _plain_add_norm(
    x: Tensor, y: Tensor, y_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return plain.add_norm(x, Product(y, y_bias), Norm(weight, bias, eps), dtype)


def _plain_activate(y: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    return plain.activate(Product(y, bias), gated)


def _plain_attend(
    qkv: Tensor, bias: Tensor | None, cosines: Tensor | None, sines: Tensor | None, keys: Tensor, values: Tensor,
    lengths: Tensor, out: Tensor, scores: Tensor | None, slots: Tensor | None,
) -> None:  # fmt: skip
    rows, heads = torch.arange(lengths.size(0)), keys.size(1)
    turn = None if cosines is None else plain.turning(cosines, sines)
    q, k, v = (one.to(keys.dtype) for one in plain.split_heads(Product(qkv, bias), heads, turn))
    keys[rows, :, lengths], values[rows, :, lengths] = k, v
    given = torch.einsum("rhd,rhcd->rhc", q.float(), keys[: len(rows)].float()) * q.size(-1) ** -0.5
    given.masked_fill_(torch.arange(keys.size(2)) > lengths[:, None, None], -float("inf"))
    largest = given.amax(-1, keepdim=True)
    shares = (given - largest).exp()
    total, sums = shares.sum(-1, keepdim=True), torch.einsum("rhc,rhcd->rhd", shares, values[: len(rows)].float())
    if out.dim() == 4:  # all in the first part
        out.zero_()
        out[..., -2] = -float("inf")
        out[:, :, 0] = torch.cat([sums, largest, total], -1)
    else:
        out.copy_((sums / total).flatten(1))
    if scores is not None:
        for head in range(heads):
            if slots[head] >= 0:
                scores[slots[head], :, :] = given[:, head, : scores.size(2)]


def _plain_combine(several: Tensor, out: Tensor) -> None:
    shares = (several[..., -2:-1] - several[..., -2:-1].amax(2, keepdim=True)).exp()
    sums = (several[..., :-2] * shares).sum(2)
    out.copy_((sums / (several[..., -1:] * shares).sum(2)).flatten(1))


for _name, _on_cuda, _on_cpu in (
    ("norm", _norm, _plain_norm),
    ("add_norm", _add_norm, _plain_add_norm),
    ("activate", _activate, _plain_activate),
    ("attend", _attend, _plain_attend),
    ("combine", _combine, _plain_combine),
):
    _library.impl(_name, _on_cuda, "CUDA")
    _library.impl(_name, _on_cpu, "CPU")
