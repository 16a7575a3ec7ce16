"""Full attention for the flow estimator, by what is fastest for device and format."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import products
from .scratch import Scratch

SCORE_BYTES = 8 * 2**20  # of attention scores at once: what a core's share of the last cache holds


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scratch: Scratch) -> Tensor:
    """Full attention of queries, keys and values (R, H, T, Dh): (R, H, T, Dh); what is not ``valid`` is not seen.

    By the fused kernel; but on a CPU, where that computes in fp32 whatever it is given, two products with a softmax
    between them take less time: in half precision less than half, in fp32 where oneDNN computes them.
    """
    by_heads = products.suits(q)
    if q.device.type != "cpu" or not (by_heads or q.dtype == torch.bfloat16):
        mask = None if valid is None else valid[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    rows, heads, frames, width = q.shape
    flat = (rows * heads, frames, width)
    q, k, v = (scratch(f"part {i}", p.shape, p.dtype).copy_(p).view(flat) for i, p in enumerate((q, k, v)))
    q *= width**-0.5
    hidden = None if valid is None else ~valid.repeat_interleave(heads, dim=0)[:, None]
    result = scratch("attended", flat, q.dtype)
    (_each_head if by_heads else _some_heads)(q, k, v, hidden, result, scratch)
    return result.view(rows, heads, frames, width)


def _each_head(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, result: Tensor, scratch: Scratch) -> None:
    weights = scratch("weights", (q.size(1), q.size(1)), q.dtype)
    values = v.transpose(1, 2).contiguous()
    for head in range(q.size(0)):
        scores = products.linear(q[head], k[head])
        if hidden is not None:
            scores.masked_fill_(hidden[head], -float("inf"))
        torch.softmax(scores, dim=-1, out=weights)
        result[head] = products.linear(weights, values[head])


def _some_heads(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, result: Tensor, scratch: Scratch) -> None:
    """As many heads at once as have their scores in the cache, in equal shares."""
    heads, frames, _ = q.shape
    fitting = max(SCORE_BYTES // (frames * frames * q.dtype.itemsize), torch.get_num_threads())
    count = -(-heads // -(-heads // fitting))
    scores, weights = (scratch(name, (count, frames, frames), q.dtype) for name in ("scores", "weights"))
    for at in range(0, heads, count):
        some = slice(at, min(at + count, heads))
        s, w = scores[: some.stop - at], weights[: some.stop - at]
        torch.bmm(q[some], k[some].transpose(1, 2), out=s)
        if hidden is not None:
            s.masked_fill_(hidden[some], -float("inf"))
        torch.softmax(s, dim=-1, out=w)
        torch.bmm(w, v[some], out=result[some])
