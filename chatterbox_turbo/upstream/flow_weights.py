"""S3Gen's estimator as the runtime reads it: upstream's own parameters, queries, keys and values fused in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..patching import Journal
from ..runtime.layers import Linear
from ..runtime.s3gen.flow_estimator import Block, EstimatorWeights, Resnet, Stage, sinusoids
from ..runtime.s3gen.frames import Conv
from . import parameters
from .modules import as_conv, as_linear, as_norm, bias_of, refuse_unless, unsuitable

MEL = 80  # channels of the state; as many each of mean, speaker and condition follow


def estimator_of(s3gen: nn.Module) -> nn.Module:
    """The velocity network."""
    return s3gen.flow.decoder.estimator


def _stages(estimator: nn.Module) -> list[tuple[nn.Module, nn.ModuleList, nn.Module | None]]:
    """Resnet, transformer blocks and closing convolution of every stage, in order."""
    down = [tuple(stage) for stage in estimator.down_blocks]
    middle = [(*stage, None) for stage in estimator.mid_blocks]
    return [*down, *middle, *(tuple(stage) for stage in estimator.up_blocks)]


def _groups(estimator: nn.Module) -> list[list[nn.Parameter]]:
    attentions = [block.attn1 for _, blocks, _ in _stages(estimator) for block in blocks]
    return [[a.to_q.weight, a.to_k.weight, a.to_v.weight] for a in attentions]


def fuse(s3gen: nn.Module, journal: Journal) -> None:
    """Queries, keys and values of each block become views of one tensor; undoing gives each its own storage."""
    parameters.fuse(lambda: _groups(estimator_of(s3gen)), journal, "fused weights of the flow estimator")


def cast(s3gen: nn.Module, dtype: torch.dtype, journal: Journal) -> parameters.Cast:
    """Change the format of every matrix of the velocity network; undoing restores each to the bit.

    Norms, biases and the time embedding keep theirs, and so does everything else of S3Gen: the encoder, the vocoder,
    and above all the token ids, which upstream casts along with the flow's weights.
    """
    estimator = estimator_of(s3gen)
    groups = [(estimator.final_proj.bias, matrices(estimator))]
    return parameters.cast(groups, dtype, journal, "number format of the flow estimator")


def matrices(estimator: nn.Module) -> Iterator[nn.Parameter]:
    """What ``cast`` changes."""
    yield from (parameter for group in _groups(estimator) for parameter in group)
    for resnet, blocks, after in _stages(estimator):
        convolutions = [resnet.block1.block[0], resnet.block2.block[0], resnet.res_conv, after]
        for block in blocks:
            yield from (block.attn1.to_out[0].weight, block.ff.net[0].proj.weight, block.ff.net[2].weight)
        yield from (convolution.weight for convolution in convolutions if convolution is not None)
    yield estimator.final_block.block[0].weight
    yield estimator.final_proj.weight


def why_not(s3gen: nn.Module, journal: Journal) -> str:
    """Why the runtime cannot compute what the velocity network does from its weights; empty where it can."""
    return unsuitable(lambda: check(s3gen), lambda: estimator_of(s3gen), "s3gen.flow.decoder.estimator", journal)


def read(s3gen: nn.Module) -> EstimatorWeights:
    """Views of the estimator's parameters; small ones (biases, the first convolution) are copied.

    Raises:
        UnsupportedModelError: an architecture that the runtime does not compute.
    """
    check(s3gen)
    estimator = estimator_of(s3gen)
    dtype = estimator.final_proj.weight.dtype
    fused = iter([parameters.fused(group) for group in _groups(estimator)])
    stages = []
    for resnet, blocks, after in _stages(estimator):
        made = tuple(_block(block, next(fused)) for block in blocks)
        stages.append(Stage(_resnet(resnet), made, None if after is None else as_conv(after)))
    first = estimator.down_blocks[0][0]
    noisy, given = _split(first.block1.block[0], dtype)
    noisy_shortcut, given_shortcut = _split(first.res_conv, dtype)
    return EstimatorWeights(
        stages=tuple(stages),
        noisy=noisy,
        noisy_shortcut=noisy_shortcut,
        given=given,
        given_shortcut=given_shortcut,
        final=as_conv(estimator.final_block.block[0]),
        final_norm=as_norm(estimator.final_block.block[2]),
        projection=as_conv(estimator.final_proj),
        heads=estimator.down_blocks[0][1][0].attn1.heads,
    )


def head_width(s3gen: nn.Module) -> int:
    """Dh, the size of one attention head."""
    _, blocks, _ = _stages(estimator_of(s3gen))[0]
    return blocks[0].attn1.to_q.out_features // blocks[0].attn1.heads


def format_of(s3gen: nn.Module) -> torch.dtype:
    """The number format of the estimator's matrices."""
    return estimator_of(s3gen).final_proj.weight.dtype


def time_projections(s3gen: nn.Module, times: Tensor) -> Tensor:
    """(S, stages, C) fp32: what each resnet adds in each step from ``times`` (S + 1,), by upstream's own modules."""
    estimator = estimator_of(s3gen)
    dtype = estimator.time_mlp.linear_1.weight.dtype  # half precision where a user has cast the whole network
    embedded = estimator.time_mlp(sinusoids(times, estimator.time_embeddings.dim).to(dtype))
    if is_mean_flow(s3gen):  # the embedding of a step's beginning and of its end
        embedded = estimator.time_embed_mixer(torch.cat([embedded[:-1], embedded[1:]], dim=1))
    else:
        embedded = embedded[:-1]
    return torch.stack([resnet.mlp(embedded) for resnet, _, _ in _stages(estimator)], dim=1).float()


def is_mean_flow(s3gen: nn.Module) -> bool:
    """Whether the estimator was distilled into few steps without guidance (Turbo)."""
    return bool(getattr(estimator_of(s3gen), "meanflow", False))


def check(s3gen: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` where the estimator computes something that the runtime does not."""
    estimator = estimator_of(s3gen)
    first = estimator.down_blocks[0][0]
    blocks = [block for _, some, _ in _stages(estimator) for block in some]
    facts: dict[str, tuple[Any, Any]] = {
        "resolutions": ((len(estimator.down_blocks), len(estimator.up_blocks)), (1, 1)),
        "causal": (bool(estimator.causal), True),
        "static_chunk_size": (getattr(estimator, "static_chunk_size", 0), 0),
        "channels of the first convolution": (first.block1.block[0].in_channels, 4 * MEL),
        "normalization": ({type(block.norm1) for block in blocks}, {nn.LayerNorm}),
        "activation": ({type(block.ff.net[0]).__name__ for block in blocks}, {"GELU"}),
        "approximation of GELU": ({getattr(block.ff.net[0], "approximate", "none") for block in blocks}, {"none"}),
        "cross attention": (any(block.attn2 is not None for block in blocks), False),
        "bias of queries": (any(block.attn1.to_q.bias is not None for block in blocks), False),
    }
    refuse_unless(facts, "estimator", "The flow solver", "flow")


def _resnet(module: nn.Module) -> Resnet:
    first, second = module.block1.block, module.block2.block
    return Resnet(
        first=as_conv(first[0]),
        first_norm=as_norm(first[2]),
        second=as_conv(second[0]),
        second_norm=as_norm(second[2]),
        shortcut=as_conv(module.res_conv),
    )


def _block(module: nn.Module, qkv: Tensor) -> Block:
    return Block(
        attention_norm=as_norm(module.norm1),
        qkv=Linear(qkv),
        out=as_linear(module.attn1.to_out[0]),
        mlp_norm=as_norm(module.norm3),
        up=as_linear(module.ff.net[0].proj),
        down=as_linear(module.ff.net[2]),
    )


def _split(module: nn.Module, dtype: torch.dtype) -> tuple[Conv, Conv]:
    """A convolution over all channels as one over the state and one, with the bias, over the rest."""
    weight = module.weight.data.to(dtype)
    bias = bias_of(module)
    return Conv(weight[:, :MEL].contiguous(), None), Conv(weight[:, MEL:].contiguous(), bias)
