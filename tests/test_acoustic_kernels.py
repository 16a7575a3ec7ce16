"""Kernels for CPUs that flow matching and its encoder attend by, and those of whole blocks by tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import chatterbox_turbo as turbo
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.cpu import attention as by_pairs
from chatterbox_turbo.runtime.cpu import tile_attention as by_tiles
from chatterbox_turbo.runtime.cpu.instructions import multiplies_pairs
from chatterbox_turbo.runtime.cpu.tiles import multiplies_tiles
from chatterbox_turbo.runtime.layers import Linear, Norm
from chatterbox_turbo.runtime.s3gen import attention as flow_attention
from chatterbox_turbo.runtime.s3gen import tiled_block
from chatterbox_turbo.runtime.s3gen.flow_estimator import Block, _transform
from chatterbox_turbo.runtime.s3gen.frames import whole_blocks

needs_pairs = pytest.mark.skipif(
    not multiplies_pairs(), reason="this processor has no AVX-512 BF16, or numba compiles for another one"
)
needs_tiles = pytest.mark.skipif(not multiplies_tiles(), reason="this processor or system has no AMX for bf16")


@needs_pairs
@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=needs_tiles)])
@pytest.mark.parametrize("frames", [6, 7, 32, 33, 64, 65, 119, 129, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16(frames, masked, tiles, monkeypatch):
    """Of parts of one tensor, as products give them; against fp32, and closer to it than torch's products in bf16."""
    if not tiles:
        monkeypatch.setattr(flow_attention, "_kernels", lambda: (by_pairs,))
    generator = torch.Generator().manual_seed(frames)
    parts = torch.randn(2, frames, 3, 3, 64, generator=generator).bfloat16().unbind(dim=2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    lengths = torch.tensor([frames, frames // 2 + 1])
    valid = torch.arange(frames) < lengths[:, None] if masked else None
    if masked:
        k, v = (x.masked_fill(~valid[:, None, :, None], 1e4) for x in (k, v))  # must not matter
    mask = None if valid is None else valid[:, None, None]
    right = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    given = flow_attention.attend(q, k, v, flow_attention.hiding(valid, q.dtype), flow_attention.Scratch())
    assert given.transpose(1, 2).is_contiguous() and given.dtype == torch.bfloat16
    assert snr_db(given.float(), right) > 50


@needs_pairs
@pytest.mark.parametrize("frames", [6, 7, 32, 33, 64, 65, 119, 129, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_with_relative_positions(frames, masked, monkeypatch):
    """Against fp32, as ``Relative`` adds them; and positions are most of the scores."""
    generator = torch.Generator().manual_seed(frames)
    q, k, v = (torch.randn(2, frames, 3, 64, generator=generator).bfloat16().transpose(1, 2) for _ in range(3))
    asking = torch.randn(2, 3, frames, 64, generator=generator).bfloat16() / 4
    distances = torch.randn(3, 2 * frames - 1, 64, generator=generator).bfloat16()
    valid = torch.arange(frames) < torch.tensor([[frames], [frames // 2 + 1]]) if masked else None
    bias, exact_bias = (flow_attention.hiding(valid, dtype) for dtype in (torch.bfloat16, torch.float32))
    right = flow_attention.attend(
        q.float(),
        k.float(),
        v.float(),
        exact_bias,
        flow_attention.Scratch(),
        flow_attention.Relative(asking.float(), distances.float()),
    )
    relative = flow_attention.Relative(asking, distances)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # which is not asked
    given = flow_attention.attend(q, k, v, bias, flow_attention.Scratch(), relative)
    assert given.shape == right.shape and given.dtype == torch.bfloat16
    assert snr_db(given.float(), right) > 48
    without = flow_attention.attend(q, k, v, bias, flow_attention.Scratch())
    assert snr_db(without.float(), right) < 6


@needs_tiles
@pytest.mark.parametrize("frames", [32, 33, 100])
def test_a_block_of_the_flow_by_tiles(frames, monkeypatch):
    """Against fp32 arithmetic over the same weights, and closer to it than torch's operations in bf16."""
    generator = torch.Generator().manual_seed(frames)

    def linear(outputs, inputs, bias=True):
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return Linear(weight.bfloat16(), torch.randn(outputs, generator=generator).bfloat16() if bias else None)

    def norm():
        return Norm(*(torch.randn(64, generator=generator) for _ in range(2)), 1e-5)

    block = Block(norm(), linear(384, 64, bias=False), linear(64, 128), norm(), linear(160, 64), linear(64, 160))
    x = 3 * torch.randn(2, frames, 64, generator=generator)
    halves = [block.qkv, block.out, block.up, block.down]
    whole = (Linear(each.weight.float(), None if each.bias is None else each.bias.float()) for each in halves)
    qkv, out, up, down = whole
    exact = Block(block.attention_norm, qkv, out, block.mlp_norm, up, down)
    given = x.clone()
    assert tiled_block.suits(block, x) and not tiled_block.suits(exact, x)
    by_tiles = _transform(block, given, 2, None, flow_attention.Scratch(), None) - x
    assert torch.equal(given, x)  # a shortcut may still need it
    right = _transform(exact, x, 2, None, flow_attention.Scratch(), None) - x
    monkeypatch.setattr(tiled_block, "suits", lambda *_: False)
    by_torch = _transform(block, x, 2, None, flow_attention.Scratch(), None) - x
    assert snr_db(by_tiles, right) > max(44, snr_db(by_torch, right))


@needs_pairs
@pytest.mark.parametrize("kernels", [by_pairs, pytest.param(by_tiles, marks=needs_tiles)])
def test_flow_matching_in_bf16_attends_by_the_kernel_alone(kernels, models, monkeypatch):
    """And compiles it before the first request."""
    called, attend = [], kernels.attend
    monkeypatch.setattr(flow_attention, "_kernels", lambda: (kernels,))
    monkeypatch.setattr(kernels, "attend", lambda *args: called.append(args[0].shape) or attend(*args))
    frames = kernels.QUERIES + 14
    model = models("english")
    with turbo.optimized(model, {"fidelity": "lossy", "precision": {"flow": "bfloat16"}}):
        assert called
        called.clear()
        monkeypatch.setattr(torch, "bmm", None)
        monkeypatch.setattr(F, "scaled_dot_product_attention", None)
        solver = model.turbo._engines.flow.solver
        x = torch.randn(1, 80, frames)
        projections = torch.zeros(2, len(solver.weights.stages), solver.weights.stages[0].resnet.first.weight.size(0))
        solver.solve(x, torch.linspace(0, 1, 3), projections, x, torch.randn(1, 80), x, guidance=0.7)
    assert called and set(called) == {(2, 2, whole_blocks(frames, torch.bfloat16, x.device), 64)}
