"""S3Gen's vocoder as the runtime reads it; upstream's modules and their weight normalization stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..patching import Journal
from ..runtime.cpu.upsampling import suitable
from ..runtime.s3gen.vocoder import Source, VocoderWeights
from ..runtime.s3gen.vocoder_network import Convolution, NetworkWeights, ResidualBlock, Snake, Upsampling
from .modules import refuse_unless, unsuitable

WEIGHT_NORM = (("weight", "_WeightNorm", 0),)  # what is parametrized, how, over which dimension


def read(
    vocoder: nn.Module,
    fold: bool,
    pieces: bool = False,
    residual: torch.dtype | None = None,
    channels_last: bool = False,
) -> VocoderWeights:
    """The weights of a ``HiFTGenerator`` as they are now: views of its parameters.

    Args:
        fold: fold weight normalization, into copies.
        pieces: transposed convolutions in pieces (``runtime.cpu.upsampling``).
        residual: the residual blocks in this format, folded; ``None``: as the others.
        channels_last: so lie the network's activations, and the weights that are copies.

    Raises:
        UnsupportedModelError: an architecture that the runtime does not compute.
    """
    check(vocoder)
    convolution = partial(_convolution, fold=fold, pieces=pieces, channels_last=channels_last)
    inside = partial(convolution, fold=fold or residual is not None, dtype=residual)
    sines = vocoder.m_source.l_sin_gen
    upsampling = vocoder.f0_upsamp.scale_factor
    source = Source(
        rate=sines.sampling_rate,
        scale=int(np.prod(upsampling)),
        harmonics=sines.harmonic_num + 1,
        amplitude=sines.sine_amp,
        noise=sines.noise_std,
        threshold=sines.voiced_threshold,
        merge=_product(vocoder.m_source.l_linear),
    )
    count = vocoder.num_kernels
    levels = tuple(
        Upsampling(
            convolution(up),
            convolution(vocoder.source_downs[index]),
            _residual(inside, vocoder.source_resblocks[index]),
            tuple(_residual(inside, block) for block in vocoder.resblocks[index * count : (index + 1) * count]),
        )
        for index, up in enumerate(vocoder.ups)
    )
    predictor = vocoder.f0_predictor
    return VocoderWeights(
        pitch=tuple(
            convolution(layer, channels_last=False) for layer in predictor.condnet if isinstance(layer, nn.Conv1d)
        ),
        pitch_head=_product(predictor.classifier),
        source=source,
        network=NetworkWeights(
            convolution(vocoder.conv_pre), levels, convolution(vocoder.conv_post), vocoder.lrelu_slope
        ),
        window=vocoder.stft_window.to(vocoder.conv_pre.bias.device),
        n_fft=vocoder.istft_params["n_fft"],
        hop=vocoder.istft_params["hop_len"],
        limit=limit_of(vocoder),
    )


def limit_of(vocoder: nn.Module) -> float:
    """The largest absolute sample that it gives."""
    return vocoder.audio_limit


def why_not(vocoder: nn.Module, journal: Journal) -> str:
    """Why the runtime cannot compute what the vocoder does from its weights; empty where it can."""
    return unsuitable(lambda: check(vocoder), lambda: vocoder, "s3gen.mel2wav", journal, parametrizations=True)


def check(vocoder: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` where the vocoder computes something that the runtime does not."""
    snakes = [module for module in vocoder.modules() if type(module).__name__ == "Snake"]
    convolutions = [module for module in vocoder.modules() if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)]
    facts = {
        "activation on a logarithmic scale": (any(snake.alpha_logscale for snake in snakes), False),
        "parametrizations": (
            {_parametrizations(convolution) for convolution in convolutions} | {(), WEIGHT_NORM},
            {(), WEIGHT_NORM},
        ),
        "padding": ({convolution.padding_mode for convolution in convolutions}, {"zeros"}),
        "number format": ({parameter.dtype for parameter in vocoder.parameters()}, {torch.float32}),
        "activation of the pitch predictor": (
            {type(layer) for layer in vocoder.f0_predictor.condnet if not isinstance(layer, nn.Conv1d)},
            {nn.ELU},
        ),
    }
    refuse_unless(facts, "vocoder", "This package's", "vocoder")


def _parametrizations(module: nn.Module) -> tuple[tuple[str, str, int | None], ...]:
    every = module.parametrizations.items() if parametrize.is_parametrized(module) else ()
    return tuple((name, type(one).__name__, getattr(one, "dim", None)) for name, some in every for one in some)


def _residual(convolution: Callable[[nn.Module], Convolution], block: nn.Module) -> ResidualBlock:
    parts = zip(block.activations1, block.convs1, block.activations2, block.convs2, strict=True)
    return ResidualBlock(tuple((_snake(a), convolution(b), _snake(c), convolution(d)) for a, b, c, d in parts))


def _snake(module: nn.Module) -> Snake:
    alpha = module.alpha.data[None, :, None]
    return Snake(alpha, 1.0 / (alpha + module.no_div_by_zero))


def _product(module: nn.Linear) -> tuple[Tensor, Tensor]:
    # the parameters and not their data: torch picks another kernel, with other last bits, where none asks for gradients
    return module.weight, module.bias


def _convolution(
    module: nn.Conv1d | nn.ConvTranspose1d,
    fold: bool,
    pieces: bool,
    channels_last: bool,
    dtype: torch.dtype | None = None,
) -> Convolution:
    transposed = isinstance(module, nn.ConvTranspose1d)
    names = ("stride", "padding", "dilation", "groups", *(("output_padding",) if transposed else ()))
    # upstream has strides of NumPy's integers, which a compiler takes for tensors
    options = {name: module.groups if name == "groups" else tuple(map(int, getattr(module, name))) for name in names}
    bias = None if module.bias is None else module.bias.data
    pieces = pieces and transposed and suitable(options)
    if fold or not parametrize.is_parametrized(module, "weight"):
        weight = module.weight.detach()
        if dtype is not None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            if channels_last:
                weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        return Convolution(weight, None, bias, options, transposed, pieces, channels_last)
    normalized = module.parametrizations.weight
    direction, magnitude = normalized.original1.data, normalized.original0.data
    return Convolution(direction, magnitude, bias, options, transposed, pieces, channels_last)
