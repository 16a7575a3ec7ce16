"""T3's backbone as the runtime reads it: upstream's own parameters, fused in place where one product serves several.

Llama: queries, keys and values become views of one tensor, gate and up of another. GPT-2: upstream keeps its
matrices as (in, out); they become transposed views of (out, in), the order in which a product with one row per
sequence reads memory from end to end. No second copy of a weight outlives the fusing of its layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..patching import Journal
from ..runtime.device.quantized import QuantizedLinear, QuantizedMatrix
from ..runtime.layers import Linear, Norm
from ..runtime.t3.weights import Layer, Weights
from . import parameters
from . import t3 as upstream_t3
from .alignment import analyzer_class, why_not_analysis
from .modules import unsuitable
from .structure import why_not_plain

Site = tuple[nn.Module, str]  # a layer by its owner and its name there
KINDS = ("qkv", "out", "up", "down")  # the products of a block, in the order in which they are computed


def products(t3: nn.Module) -> Iterator[tuple[int, str, list[Site]]]:
    """Every product of the backbone: the number of its block, its kind, and the layers that share it, by their rows."""
    if upstream_t3.is_llama(t3):
        for index, layer in enumerate(t3.tfmr.layers):
            attention, mlp = layer.self_attn, layer.mlp
            yield index, "qkv", [(attention, "q_proj"), (attention, "k_proj"), (attention, "v_proj")]
            yield index, "out", [(attention, "o_proj")]
            yield index, "up", [(mlp, "gate_proj"), (mlp, "up_proj")]
            yield index, "down", [(mlp, "down_proj")]
    else:
        for index, block in enumerate(t3.tfmr.h):
            sites = (block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")
            yield from ((index, kind, [site]) for kind, site in zip(KINDS, sites, strict=True))


def _layers(sites: Sequence[Site]) -> list[nn.Module]:
    return [getattr(owner, name) for owner, name in sites]


def _groups(t3: nn.Module) -> Iterator[list[Tensor]]:
    """The tensors that lie below one another for a product: weights, or codes, scales and zeros."""
    for _, _, sites in products(t3):
        layers = _layers(sites)
        if not any(isinstance(layer, QuantizedLinear) for layer in layers):
            if len(layers) > 1 or not upstream_t3.is_llama(t3):
                yield [layer.weight for layer in layers]
        elif len(layers) > 1:
            tensors = (layer.matrix(torch.float32).tensors for layer in layers)
            yield from (list(each) for each in zip(*tensors, strict=True))


def cast(t3: nn.Module, dtype: torch.dtype, journal: Journal) -> parameters.Cast:
    """Change the format of every matrix that a step reads; undoing restores each to the bit.

    Norms, embeddings and the conditioning encoder keep theirs: they are a twentieth of the weights.
    """
    *plain, head = matrices(t3)
    groups = [(final_norm(t3).weight, plain), (t3.speech_emb.weight, [head])]
    return parameters.cast(groups, dtype, journal, "number format of T3")


def final_norm(t3: nn.Module) -> nn.Module:
    """What the backbone ends with; it keeps its format here, and so shows whether an app has cast T3."""
    return t3.tfmr.norm if upstream_t3.is_llama(t3) else t3.tfmr.ln_f


def matrices(t3: nn.Module) -> list[nn.Parameter]:
    """What ``cast`` changes: the matrices that a step reads and that are not quantized, the head's last."""
    layers = [layer for _, _, sites in products(t3) for layer in _layers(sites)]
    plain = [layer.weight for layer in layers if not isinstance(layer, QuantizedLinear)]
    return [*plain, t3.speech_head.weight]


def fuse(t3: nn.Module, journal: Journal) -> None:
    """Give every group one storage; undoing gives each parameter its own, contiguous as upstream made it."""
    parameters.fuse(lambda: list(_groups(t3)), journal, "fused weights of T3", not upstream_t3.is_llama(t3))


def modules(t3: nn.Module) -> tuple[nn.Module, ...]:
    """The backbone and its head, whose weights ``read`` gives."""
    return t3.tfmr, t3.speech_head


def format_of(t3: nn.Module) -> torch.dtype:
    """The number format of the matrices that a step reads."""
    return t3.speech_head.weight.dtype


# beside the backbone; the embeddings are part of a captured step
_TABLES = ("speech_head", "speech_emb", "speech_pos_emb")


def _altered(t3: nn.Module, name: str, journal: Journal) -> str:
    module = getattr(t3, name, None)
    return "" if module is None else why_not_plain(module, f"t3.{name}", journal)


def why_not(t3: nn.Module, journal: Journal) -> str:
    """Why the runtime cannot compute what this backbone does from its weights; empty where it can."""
    return (
        unsuitable(lambda: check(t3), lambda: t3.tfmr, "t3.tfmr", journal)
        or next((reason for name in _TABLES if (reason := _altered(t3, name, journal))), "")
        or why_not_analysis(t3)
    )


def read(t3: nn.Module) -> Weights:
    """Views of the backbone's parameters; groups that somebody took apart (``.to()``, ``.bfloat16()``) are fused anew.

    Raises:
        UnsupportedModelError: a configuration that the runtime does not compute (grouped queries, other activations).
    """
    check(t3)
    matrices = [_matrix(t3, _layers(sites)) for _, _, sites in products(t3)]
    blocks = [matrices[first : first + len(KINDS)] for first in range(0, len(matrices), len(KINDS))]
    return _llama(t3, blocks) if upstream_t3.is_llama(t3) else _gpt2(t3, blocks)


def _matrix(t3: nn.Module, layers: Sequence[nn.Module]) -> Tensor | QuantizedMatrix:
    """The rows of layers that share a product as one matrix: a view of what they hold."""
    first, transposed = layers[0], not upstream_t3.is_llama(t3)
    if not isinstance(first, QuantizedLinear):
        if len(layers) == 1 and not transposed:
            return first.weight.data
        return parameters.fused([layer.weight for layer in layers], transposed)
    dtype = t3.speech_head.weight.dtype
    matrices = [layer.matrix(dtype) for layer in layers]
    if len(matrices) == 1:
        return matrices[0]
    rows = [parameters.fused(each) for each in zip(*(matrix.tensors for matrix in matrices), strict=True)]
    return replace(matrices[0], codes=rows[0], scales=rows[1], zeros=rows[2] if len(rows) > 2 else None)


def _llama(t3: nn.Module, blocks: list[list[Tensor | QuantizedMatrix]]) -> Weights:
    model = t3.tfmr
    layers = []
    for layer, (qkv, out, up, down) in zip(model.layers, blocks, strict=True):
        layers.append(
            Layer(
                attention_norm=_norm(layer.input_layernorm),
                qkv=Linear(qkv),
                out=Linear(out, _bias(layer.self_attn.o_proj)),
                mlp_norm=_norm(layer.post_attention_layernorm),
                up=Linear(up),
                down=Linear(down, _bias(layer.mlp.down_proj)),
            )
        )
    return Weights(
        layers=tuple(layers),
        final_norm=_norm(model.norm),
        head=_linear(t3.speech_head),
        heads=model.config.num_attention_heads,
        gated=True,
        inverse_frequencies=model.rotary_emb.inv_freq.float(),
        rotary_scale=float(getattr(model.rotary_emb, "attention_scaling", 1.0)),
    )


def _gpt2(t3: nn.Module, blocks: list[list[Tensor | QuantizedMatrix]]) -> Weights:
    model = t3.tfmr
    layers = []
    for block, (qkv, out, up, down) in zip(model.h, blocks, strict=True):
        layers.append(
            Layer(
                attention_norm=_norm(block.ln_1),
                qkv=Linear(qkv, block.attn.c_attn.bias.data),
                out=Linear(out, block.attn.c_proj.bias.data),
                mlp_norm=_norm(block.ln_2),
                up=Linear(up, block.mlp.c_fc.bias.data),
                down=Linear(down, block.mlp.c_proj.bias.data),
            )
        )
    return Weights(
        layers=tuple(layers),
        final_norm=_norm(model.ln_f),
        head=_linear(t3.speech_head),
        heads=model.config.n_head,
        gated=False,
        positions=model.wpe.weight.data,
    )


def _norm(module: nn.Module) -> Norm:
    bias = getattr(module, "bias", None)
    eps = module.eps if bias is not None else module.variance_epsilon
    return Norm(module.weight.data, None if bias is None else bias.data, eps)


def _linear(module: nn.Module) -> Linear:
    return Linear(module.weight.data, _bias(module))


def _bias(module: nn.Module) -> Tensor | None:
    return None if module.bias is None else module.bias.data


FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def check(t3: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` where the backbone computes something that the runtime does not."""
    config, dtype = t3.tfmr.config, t3.speech_head.weight.dtype
    for _, kind, sites in products(t3):
        if len(schemes := {getattr(layer, "scheme", "") for layer in _layers(sites)}) > 1:
            found = ", ".join(sorted(scheme or "none" for scheme in schemes))
            raise UnsupportedModelError(f"Layers that share a product ({kind}) are quantized in several ways: {found}.")
    if dtype not in FORMATS:  # in double precision random numbers are others, and so are the tokens
        raise UnsupportedModelError(
            f"T3's weights are {dtype}.", "The static backbone computes float32 and half precision.", ""
        )
    if upstream_t3.is_llama(t3):
        facts = {
            "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads),
            "hidden_act": (config.hidden_act, "silu"),
            "attention_bias": (bool(config.attention_bias), False),
            "mlp_bias": (bool(config.mlp_bias), False),
        }
    else:
        facts = {
            "activation_function": (config.activation_function, "gelu_new"),
            "scale_attn_weights": (config.scale_attn_weights, True),
            "scale_attn_by_inverse_layer_idx": (config.scale_attn_by_inverse_layer_idx, False),
        }
    for name, (found, wanted) in facts.items():
        if found != wanted:
            raise UnsupportedModelError(
                f"T3's backbone has {name} = {found!r}.",
                f"The static backbone computes {wanted!r} only.",
                'Set decoding.backbone = "upstream".',
            )


def watched_heads(t3: nn.Module) -> tuple[tuple[int, int], ...]:
    """(layer, head) pairs whose attention the multilingual analyzer reads; none where this release has no analyzer."""
    cls = analyzer_class(t3)
    if cls is None:
        return ()
    return tuple(getattr(sys.modules[cls.__module__], "LLAMA_ALIGNED_HEADS", ()))
