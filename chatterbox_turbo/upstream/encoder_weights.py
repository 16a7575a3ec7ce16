"""S3Gen's encoder as the runtime reads it: upstream's own parameters, queries, keys and values fused in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..patching import Journal
from ..runtime.layers import Linear
from ..runtime.s3gen.speech_encoder import EncoderWeights, Layer, Stack
from . import parameters
from .modules import as_conv, as_linear, as_norm, bias_of, refuse_unless, unsuitable

Projections = tuple[nn.Linear, nn.Linear, nn.Linear]


def encoder_of(s3gen: nn.Module) -> nn.Module:
    """The encoder of speech tokens."""
    return s3gen.flow.encoder


def head_width(s3gen: nn.Module) -> int:
    """Dh, the size of one attention head."""
    return encoder_of(s3gen).encoders[0].self_attn.d_k


def format_of(s3gen: nn.Module) -> torch.dtype:
    """The number format of the encoder's matrices."""
    return encoder_of(s3gen).encoders[0].self_attn.linear_q.weight.dtype


def _layers(encoder: nn.Module) -> list[nn.Module]:
    return [*encoder.encoders, *encoder.up_encoders]


def _convolutions(encoder: nn.Module) -> tuple[nn.Conv1d, nn.Conv1d, nn.Conv1d]:
    look_ahead = encoder.pre_lookahead_layer
    return look_ahead.conv1, look_ahead.conv2, encoder.up_layer.conv


def _projections(layer: nn.Module) -> Projections:
    attention = layer.self_attn
    return attention.linear_q, attention.linear_k, attention.linear_v


def fuse(s3gen: nn.Module, journal: Journal) -> None:
    """Queries, keys and values of each layer become views of one tensor; undoing gives each its own storage."""

    def groups() -> list[list[nn.Parameter]]:
        return [[part.weight for part in _projections(layer)] for layer in _layers(encoder_of(s3gen))]

    parameters.fuse(groups, journal, "fused weights of the flow encoder")


def cast(s3gen: nn.Module, dtype: torch.dtype, journal: Journal) -> parameters.Cast:
    """Change the format of every matrix of the encoder; undoing restores each to the bit.

    Norms and biases keep theirs, and so does everything else of S3Gen.
    """
    encoder = encoder_of(s3gen)
    groups = [(encoder.after_norm.weight, matrices(encoder))]
    return parameters.cast(groups, dtype, journal, "number format of the flow encoder")


def matrices(encoder: nn.Module) -> Iterator[nn.Parameter]:
    """What ``cast`` changes."""
    for layer in _layers(encoder):
        attention, mlp = layer.self_attn, layer.feed_forward
        linears = [*_projections(layer), attention.linear_pos, attention.linear_out, mlp.w_1, mlp.w_2]
        yield from (linear.weight for linear in linears)
    yield from (embed.out[0].weight for embed in (encoder.embed, encoder.up_embed))
    yield from (conv.weight for conv in _convolutions(encoder))


def why_not(s3gen: nn.Module, journal: Journal) -> str:
    """Why the runtime cannot compute what the encoder does from its weights; empty where it can."""
    return unsuitable(lambda: check(s3gen), lambda: encoder_of(s3gen), "s3gen.flow.encoder", journal)


def read(s3gen: nn.Module) -> EncoderWeights:
    """Views of the encoder's parameters; small ones (biases) are copied.

    Raises:
        UnsupportedModelError: an architecture that the runtime does not compute.
    """
    check(s3gen)
    encoder = encoder_of(s3gen)
    look_ahead, upsampling = encoder.pre_lookahead_layer, encoder.up_layer
    return EncoderWeights(
        tokens=_stack(encoder.embed, encoder.encoders),
        look_ahead=(as_conv(look_ahead.conv1), as_conv(look_ahead.conv2)),
        upsampling=as_conv(upsampling.conv),
        stride=upsampling.stride,
        frames=_stack(encoder.up_embed, encoder.up_encoders),
        final_norm=as_norm(encoder.after_norm),
        heads=encoder.encoders[0].self_attn.h,
    )


def check(s3gen: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` where the encoder computes something that the runtime does not."""
    encoder = encoder_of(s3gen)
    layers = _layers(encoder)
    ahead, stride = encoder.pre_lookahead_layer.pre_lookahead_len, encoder.up_layer.stride
    facts: dict[str, tuple[Any, Any]] = {
        "norms before": (bool(encoder.normalize_before) and all(layer.normalize_before for layer in layers), True),
        "global normalization": (encoder.global_cmvn is not None, False),
        "chunks": ((encoder.static_chunk_size, bool(encoder.use_dynamic_chunk)), (0, False)),
        "kernels": ([conv.kernel_size[0] for conv in _convolutions(encoder)], [ahead + 1, 3, 2 * stride + 1]),
        "attention": ({type(layer.self_attn).__name__ for layer in layers}, {"RelPositionMultiHeadedAttention"}),
        "positions": (
            {type(embed.pos_enc).__name__ for embed in (encoder.embed, encoder.up_embed)},
            {"EspnetRelPositionalEncoding"},
        ),
        "convolutions in layers": (any(layer.conv_module is not None for layer in layers), False),
        "second MLPs": (any(layer.feed_forward_macaron is not None for layer in layers), False),
        "activation": ({type(layer.feed_forward.activation) for layer in layers}, {nn.SiLU}),
    }
    refuse_unless(facts, "encoder", "The flow pass", "flow")


def _stack(embed: nn.Module, layers: nn.ModuleList) -> Stack:
    return Stack(as_linear(embed.out[0]), as_norm(embed.out[1]), tuple(_layer(layer) for layer in layers))


def _layer(module: nn.Module) -> Layer:
    attention, mlp = module.self_attn, module.feed_forward
    return Layer(
        attention_norm=as_norm(module.norm_mha),
        qkv=Linear(parameters.fused([part.weight for part in _projections(module)]), _biases(_projections(module))),
        positions=as_linear(attention.linear_pos),
        content_bias=attention.pos_bias_u.data,
        position_bias=attention.pos_bias_v.data,
        out=as_linear(attention.linear_out),
        mlp_norm=as_norm(module.norm_ff),
        up=as_linear(mlp.w_1),
        down=as_linear(mlp.w_2),
    )


def _biases(modules: Projections) -> Tensor:
    each = (bias_of(module) for module in modules)
    pairs = zip(modules, each, strict=True)
    return torch.cat([m.weight.new_zeros(m.out_features) if bias is None else bias for m, bias in pairs])
