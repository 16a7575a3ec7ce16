"""Full attention for the flow's estimator and encoder, by what is fastest for device and format."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu import onednn as products
from ..cpu.arrays import array
from ..cpu.threads import kernel_threads, why_no_kernels
from ..device.attention_kernels import Boundaries, Kernel
from .scratch import Scratch

SMALL = 60.0  # scores whose exponentials, and sums of thousands of them, fit fp32 and bf16 on both sides
SCORE_BYTES = 8 * 2**20  # of attention scores at once: what a core's share of the last cache holds


@dataclass(frozen=True)
class Relative:
    """What positions add to the scores of queries and keys: ``queries`` meet ``keys`` by their distance.

    Attributes:
        queries: (R, H, T, Dh), scaled.
        keys: (H, 2 T - 1, Dh), of the distances T - 1 to 1 - T.
    """

    queries: Tensor
    keys: Tensor

    def of_head(self, number: int) -> Tensor:
        """(T, T) of head ``number`` of all R H."""
        heads = self.keys.size(0)
        return _shifted(products.linear(self.queries[number // heads, number % heads], self.keys[number % heads]))

    def of_all(self) -> Tensor:
        """(R, H, T, T)."""
        return _shifted(self.queries @ self.keys.transpose(1, 2))


def _shifted(scores: Tensor) -> Tensor:
    """(…, T, 2 T - 1) by distance to (…, T, T) by key: row i begins i places further left. A view."""
    frames = scores.size(-2)
    outer = scores.stride()[:-2]
    row = 2 * frames - 1
    return scores.as_strided((*scores.shape[:-2], frames, frames), (*outer, row - 1, 1), frames - 1)


def hiding(valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(R, 1, 1, T) in the format of the scores, 0 for keys that are seen and -inf for others, of ``valid`` (R, T) bool.

    Made once for all blocks and steps, in the form that torch's kernels on CUDA read: from a bool they would make it
    at every call by three kernels, and where rows do not begin at multiples of 8 numbers, copy it by a fourth.
    ``None`` remains ``None``.
    """
    if valid is None:
        return None
    rows, frames = valid.shape
    padded = torch.zeros(rows, 1, 1, -(-frames // 8) * 8, dtype=dtype, device=valid.device)
    return padded[..., :frames].masked_fill_(~valid[:, None, None], -float("inf"))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Boundaries | None,
    scratch: Scratch,
    relative: Relative | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Full attention of queries, keys and values (R, H, T, Dh): (R, H, T, Dh).

    Without ``kernel`` by torch's fused one; but on a CPU, where that computes in fp32 whatever it is given, one of this
    package in bf16, where the processor has the instructions, and else two products with a softmax between them, which
    in bf16 take less than half of the time, and in fp32 less where oneDNN computes them.

    Args:
        bias: (R, 1, 1, T), added to the scores (``hiding``); ``None`` where all keys are seen. With ``kernel`` and
            without ``relative``, what ``kernel.hide`` makes of it.
        relative: added to the scores before the softmax.
        kernel: computes it instead.
    """
    if kernel is not None:
        return kernel(q, k, v, bias if relative is None else _aligned(relative.of_all(), bias))
    kernels = _kernels_for(q, relative)
    if kernels is not None:
        return _attend_in_caches(kernels, q, k, v, bias, scratch, relative)
    by_heads = products.suits(q)
    if q.device.type != "cpu" or not (by_heads or (q.dtype == torch.bfloat16 and relative is None)):
        if relative is not None:
            bias = _aligned(relative.of_all(), bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    rows, heads, frames, width = q.shape
    flat = (rows * heads, frames, width)
    q, k, v = (scratch(f"part {i}", p.shape, p.dtype).copy_(p).view(flat) for i, p in enumerate((q, k, v)))
    q *= width**-0.5
    hidden = None if bias is None else bias.flatten(1).repeat_interleave(heads, dim=0)[:, None]
    result = scratch("attended", flat, q.dtype)
    if by_heads:
        _each_head(q, k, v, hidden, relative, result, scratch)
    else:
        _some_heads(q, k, v, hidden, result, scratch)
    return result.view(rows, heads, frames, width)


def _aligned(scores: Tensor, bias: Tensor | None) -> Tensor:
    """(R, H, T, T) scores and bias in rows that begin at multiples of 8 numbers, as ``hiding`` makes them."""
    width = scores.size(-1)
    padded = scores.new_empty((*scores.shape[:-1], -(-width // 8) * 8))
    padded[..., width:] = 0.0  # read by whole vectors, and it might be no number
    result = padded[..., :width]
    return result.copy_(scores) if bias is None else torch.add(scores, bias, out=result)


def prepare(dtype: torch.dtype, device: torch.device, positions: bool = False) -> None:
    """Compile what attention in this format needs: seconds where no process has done it before.

    ``positions``: with those that are relative.
    """
    if positions and not attends_in_caches(dtype, device):
        return
    for frames in (8, 64):  # few and many, which go by kernels of their own
        parts = torch.zeros(1, frames, 3, 1, 64, dtype=dtype, device=device).unbind(dim=2)
        q, k, v = (part.transpose(1, 2) for part in parts)  # laid out as a product gives them
        relative = Relative(q.contiguous(), k.new_zeros(1, 2 * frames - 1, 64)) if positions else None
        attend(q, k, v, None, Scratch(), relative)


def attends_in_caches(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels of this package for a format, where heads have the width that they are made for."""
    return not torch.compiler.is_compiling() and device.type == "cpu" and dtype == torch.bfloat16 and bool(_kernels())


def _kernels_for(q: Tensor, relative: Relative | None) -> ModuleType | None:
    if not attends_in_caches(q.dtype, q.device):
        return None
    frames, width = q.shape[2:]
    suitable = (each for each in _kernels() if width == each.WIDTH and frames >= each.QUERIES)
    return next((each for each in suitable if relative is None or hasattr(each, "attend_by_distance")), None)


@functools.cache
def _kernels() -> tuple[ModuleType, ...]:
    """Those that this processor runs, the fastest first."""
    if why_no_kernels():
        return ()
    from ..cpu import attention as by_pairs
    from ..cpu import tile_attention as by_tiles
    from ..cpu.instructions import multiplies_pairs
    from ..cpu.tiles import multiplies_tiles

    return (*((by_tiles,) if multiplies_tiles() else ()), *((by_pairs,) if multiplies_pairs() else ()))


def _attend_in_caches(
    kernels: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scratch: Scratch,
    relative: Relative | None,
) -> Tensor:
    rows, heads, frames, width = q.shape
    padded, lanes = -(-frames // kernels.GROUP) * kernels.GROUP, kernels.LANES
    seen = scratch("seen", (rows, padded), torch.float32).fill_(kernels.HIDDEN)
    seen[:, :frames] = 0.0 if bias is None else bias.flatten(1).clamp(min=kernels.HIDDEN)
    keys = scratch("keys", (rows * heads, padded // lanes, width // 2, lanes, 2), q.dtype)
    values = scratch("values", (rows * heads, padded // 2, width, 2), q.dtype)
    result = scratch("attended", (rows, frames, heads, width), q.dtype)
    parts = (q, k, v, seen, keys, values, result)
    if relative is not None:
        total = -(-(2 * frames - 1) // kernels.GROUP) * kernels.GROUP
        places = scratch("places", (heads, total // lanes, width // 2, lanes, 2), q.dtype)
        parts = (*parts, relative.queries * width**0.5, relative.keys, places)  # the kernel scales the sums
    with kernel_threads():
        (kernels.attend if relative is None else kernels.attend_by_distance)(*map(array, parts))
    return result.transpose(1, 2)


def _each_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    relative: Relative | None,
    result: Tensor,
    scratch: Scratch,
) -> None:
    weights = scratch("weights", (q.size(1), q.size(1)), q.dtype)
    values = v.transpose(1, 2).contiguous()
    for head in range(q.size(0)):
        scores = products.linear(q[head], k[head])
        if relative is not None:
            scores += relative.of_head(head)
        if hidden is not None:
            scores += hidden[head]
        torch.softmax(scores, dim=-1, out=weights)
        result[head] = products.linear(weights, values[head])


def _some_heads(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, result: Tensor, scratch: Scratch) -> None:
    """As many heads at once as have their scores in the cache, in equal shares.

    A softmax reads and writes the scores several times. Where no score can be large, their exponentials need no
    largest one subtracted before, and are divided by their sum after the product, where there is less to divide.
    """
    heads, frames, _ = q.shape
    fitting = max(SCORE_BYTES // (frames * frames * q.dtype.itemsize), torch.get_num_threads())
    count = -(-heads // -(-heads // fitting))
    small = _largest_length(q) * _largest_length(k) < SMALL
    scores, weights = (scratch(name, (count, frames, frames), q.dtype) for name in ("scores", "weights"))
    for at in range(0, heads, count):
        some = slice(at, min(at + count, heads))
        s, w = scores[: some.stop - at], weights[: some.stop - at]
        torch.bmm(q[some], k[some].transpose(1, 2), out=s)
        if hidden is not None:
            s += hidden[some]
        if small:
            sums = s.exp_().sum(dim=-1, keepdim=True)
            torch.bmm(s, v[some], out=result[some]).div_(sums)
        else:
            torch.softmax(s, dim=-1, out=w)
            torch.bmm(w, v[some], out=result[some])


def _largest_length(x: Tensor) -> float:
    """Of the vectors in the last dimension: no score exceeds the product of two such (Cauchy-Schwarz)."""
    return torch.linalg.vector_norm(x, dim=-1).max().item()
