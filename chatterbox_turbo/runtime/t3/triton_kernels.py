"""Triton kernels of the decode step: what stands between two matrix products, in one launch each.

All arithmetic is fp32, whatever the tensors hold, and no tensor cores are used, so that TF32 has no say. Imported only
where Triton is installed and used; with ``TRITON_INTERPRET=1`` in the environment they run on tensors of the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS = 32  # of the cache, read at once
COLUMNS = 512  # of an activation, computed by one program


@triton.jit
def _add_norm(
    x_from, y_from, y_bias, weight, bias, x_to, h_to, width, eps,
    HAS_Y: tl.constexpr, HAS_Y_BIAS: tl.constexpr, CENTERED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    inside = columns < width
    at = row * width + columns
    x = tl.load(x_from + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        x += tl.load(y_from + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_Y_BIAS:
            x += tl.load(y_bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_to + at, x, mask=inside)
    if CENTERED:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    h = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps))
    h *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        h += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_to + at, h.to(h_to.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, h: Tensor
) -> Tensor:
    """``x + y + y_bias`` (R, D) fp32, and its norm into ``h`` (R, D); RMSNorm without ``bias``, else LayerNorm."""
    rows, width = x.shape
    total = x if y is None else torch.empty_like(x)
    _add_norm[(rows,)](
        x, y, y_bias, weight, bias, total, h, width, eps,
        HAS_Y=y is not None, HAS_Y_BIAS=y_bias is not None, CENTERED=bias is not None,
        SIZE=triton.next_power_of_2(width), num_warps=4 if width <= 1024 else 8,
    )  # fmt: skip
    return total


@triton.jit
def _activate(y_from, y_bias, to, width, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = columns < width
    first = row * width * (2 if GATED else 1) + columns
    y = tl.load(y_from + first, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(y_bias + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(y_from + first + width, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            up += tl.load(y_bias + width + columns, mask=inside, other=0.0).to(tl.float32)
        result = y / (1.0 + tl.exp(-y)) * up
    else:  # y * (1 + tanh(z)) / 2 is y * sigmoid(2 z)
        z = 1.5957691216057308 * (y + 0.044715 * y * y * y)
        result = y / (1.0 + tl.exp(-z))
    tl.store(to + row * width + columns, result.to(to.dtype.element_ty), mask=inside)


def activate(y: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    """SiLU(gate) * up of (R, 2 F), or GELU (tanh) of (R, F), to (R, F) in the format of ``y``."""
    rows, width = y.size(0), y.size(1) // (2 if gated else 1)
    result = y.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, COLUMNS))
    _activate[grid](y, bias, result, width, HAS_BIAS=bias is not None, GATED=gated, SIZE=COLUMNS)
    return result


@triton.jit
def _half(qkv, bias, at, columns, HAS_BIAS: tl.constexpr):
    """Half a head of queries, keys or values."""
    x = tl.load(qkv + at).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns).to(tl.float32)
    return x


@triton.jit
def _attend(
    qkv, bias, cosines, sines, keys, values, lengths, out, scores, slots,
    heads, row_stride, head_stride, position_stride, score_slot_stride, score_row_stride, scale,
    HAS_BIAS: tl.constexpr, ROTARY: tl.constexpr, WATCHED: tl.constexpr, SPLITS: tl.constexpr,
    HALF: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One query of one head over a part of its row's positions; the first part takes in the new position as well.

    Nothing that this launch writes to the cache is read by it.
    """
    row, head, split = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
    half = tl.arange(0, HALF)
    low = head * 2 * HALF + half
    width = heads * 2 * HALF
    base = row * 3 * width
    q_low = _half(qkv, bias, base + low, low, HAS_BIAS)
    q_high = _half(qkv, bias, base + low + HALF, low + HALF, HAS_BIAS)
    k_low = _half(qkv, bias, base + width + low, width + low, HAS_BIAS)
    k_high = _half(qkv, bias, base + width + low + HALF, width + low + HALF, HAS_BIAS)
    v_low = _half(qkv, bias, base + 2 * width + low, 2 * width + low, HAS_BIAS)
    v_high = _half(qkv, bias, base + 2 * width + low + HALF, 2 * width + low + HALF, HAS_BIAS)
    if ROTARY:
        cosine = tl.load(cosines + row * HALF + half)
        sine = tl.load(sines + row * HALF + half)
        q_low, q_high = q_low * cosine - q_high * sine, q_high * cosine + q_low * sine
        k_low, k_high = k_low * cosine - k_high * sine, k_high * cosine + k_low * sine
    # as the cache will have them
    kind = keys.dtype.element_ty
    q_low, q_high = q_low.to(kind).to(tl.float32), q_high.to(kind).to(tl.float32)
    k_low, k_high = k_low.to(kind).to(tl.float32), k_high.to(kind).to(tl.float32)
    v_low, v_high = v_low.to(kind).to(tl.float32), v_high.to(kind).to(tl.float32)

    length = tl.load(lengths + row)
    start = row.to(tl.int64) * row_stride + head * head_stride
    new = start + length * position_stride + half
    first = split == 0
    writes = first & (half >= 0)
    tl.store(keys + new, k_low.to(kind), mask=writes)
    tl.store(keys + new + HALF, k_high.to(kind), mask=writes)
    tl.store(values + new, v_low.to(kind), mask=writes)
    tl.store(values + new + HALF, v_high.to(kind), mask=writes)

    score = (tl.sum(q_low * k_low, 0) + tl.sum(q_high * k_high, 0)) * scale
    if WATCHED:
        slot = tl.load(slots + head)
        watch = scores + slot * score_slot_stride + row * score_row_stride
        tl.store(watch + length + half, score + 0.0 * half, mask=writes & (half == 0) & (slot >= 0))
    largest = tl.where(first, score, float("-inf"))
    total = tl.where(first, 1.0, 0.0)
    sum_low = tl.where(first, v_low, 0.0)
    sum_high = tl.where(first, v_high, 0.0)

    each = tl.cdiv(length, SPLITS * SIZE) * SIZE
    begin = split * each
    end = tl.minimum(begin + each, length)
    for at in range(begin, end, SIZE):
        positions = at + tl.arange(0, SIZE)
        there = positions < end
        where = start + positions[:, None] * position_stride + half[None, :]
        mask = there[:, None]
        block_low = tl.load(keys + where, mask=mask, other=0.0).to(tl.float32)
        block_high = tl.load(keys + where + HALF, mask=mask, other=0.0).to(tl.float32)
        block = (tl.sum(block_low * q_low[None, :], 1) + tl.sum(block_high * q_high[None, :], 1)) * scale
        if WATCHED:
            tl.store(watch + positions, block, mask=there & (slot >= 0))
        block = tl.where(there, block, float("-inf"))
        larger = tl.maximum(largest, tl.max(block, 0))
        fade = tl.exp(largest - larger)
        shares = tl.exp(block - larger)
        total = total * fade + tl.sum(shares, 0)
        block_low = tl.load(values + where, mask=mask, other=0.0).to(tl.float32)
        block_high = tl.load(values + where + HALF, mask=mask, other=0.0).to(tl.float32)
        sum_low = sum_low * fade + tl.sum(shares[:, None] * block_low, 0)
        sum_high = sum_high * fade + tl.sum(shares[:, None] * block_high, 0)
        largest = larger

    if SPLITS == 1:
        to = out + row * width + low
        tl.store(to, (sum_low / total).to(out.dtype.element_ty))
        tl.store(to + HALF, (sum_high / total).to(out.dtype.element_ty))
    else:  # (R, H, SPLITS, Dh + 2): sums, their largest score, their total
        to = out + (tl.program_id(0) * SPLITS + split) * (2 * HALF + 2)
        tl.store(to + half, sum_low)
        tl.store(to + half + HALF, sum_high)
        tl.store(to + 2 * HALF, largest)
        tl.store(to + 2 * HALF + 1, total)


def attend(
    qkv: Tensor,
    bias: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    out: Tensor,
    scores: Tensor | None,
    slots: Tensor | None,
) -> None:
    """Turn queries and keys, append keys and values to the cache, and attend.

    Args:
        qkv: (R, 3 D), queries, keys and values one beside the other.
        bias: (3 D,), still to be added to them.
        cosines, sines: (R, Dh / 2) fp32 of rotary embedding.
        keys, values: (R or more, H, C, Dh), of any strides but the last; row r is written at ``lengths[r]``.
        lengths: (R,) int64, positions filled before this one.
        out: (R, D) in any format; or (R, H, S, Dh + 2) fp32, the S parts that ``combine`` takes.
        scores: (n, R, C) fp32, filled up to and with the new position for heads whose entry in ``slots`` (H,) int64
            is not negative.
    """
    rows, (heads, _, head_width) = lengths.size(0), keys.shape[1:]
    splits = out.size(2) if out.dim() == 4 else 1
    _attend[(rows * heads, splits)](
        qkv, bias, cosines, sines, keys, values, lengths, out, scores, slots,
        heads, *keys.stride()[:3], *((0, 0) if scores is None else scores.stride()[:2]), head_width**-0.5,
        HAS_BIAS=bias is not None, ROTARY=cosines is not None, WATCHED=scores is not None, SPLITS=splits,
        HALF=head_width // 2, SIZE=POSITIONS,
    )  # fmt: skip


@triton.jit
def _combine(parts, out, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    base = parts + (tl.program_id(0) * SPLITS + split) * (WIDTH + 2)
    largest = tl.load(base + WIDTH)
    shares = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(shares * tl.load(base + WIDTH + 1), 0)
    sums = tl.load(base[:, None] + column[None, :])
    result = tl.sum(sums * shares[:, None], 0) / total
    tl.store(out + tl.program_id(0) * WIDTH + column, result.to(out.dtype.element_ty))


def combine(parts: Tensor, out: Tensor) -> None:
    """Parts (R, H, S, Dh + 2) fp32 of ``attend`` to (R, D)."""
    rows, heads, splits, width = parts.shape
    _combine[(rows * heads,)](parts, out, SPLITS=splits, WIDTH=width - 2, num_warps=1)
