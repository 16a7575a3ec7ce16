"""The convolutions of HiFTNet (2023) between its two transforms: mel frames and the source's spectrum to a spectrum.

Activations are in place. A length can be padded to one for which there is a graph: behind the end of an utterance every
convolution reads zeros, as it does where the utterance ends by itself.

What is (B, C, T) here lies in memory so, or with all channels of a moment side by side (``channels_last``). oneDNN's
convolutions want the latter and copy what they read and write otherwise: those of the residual blocks in bf16 take
0.43 s of 300 mel frames instead of 0.6, where two cores with AVX-512 need 0.4 to multiply.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.arrays import array
from ..cpu.threads import kernel_threads, why_no_kernels
from ..cpu.upsampling import by_product, in_pieces
from ..device.devices import on_device
from .graphed import GraphedNetwork
from .scratch import Scratch

PART = 2**19  # bytes of an activation at once
_KERNEL_FORMATS = {torch.float32, torch.bfloat16}


@dataclass(frozen=True)
class Convolution:
    """A convolution over time, or a transposed one.

    Attributes:
        direction: the weight, or where there is a ``magnitude``, what weight normalization (2016) scales to it.
        options: stride, padding, dilation.
        pieces: a transposed one is computed in pieces (``cpu.upsampling``).
        channels_last: what it reads and writes lies so.
    """

    direction: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    options: dict[str, Any]
    transposed: bool = False
    pieces: bool = False
    channels_last: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight, computed anew where it is normalized."""
        return self.direction if self.magnitude is None else torch._weight_norm(self.direction, self.magnitude, 0)


@dataclass(frozen=True)
class Snake:
    """x + sin(alpha x)^2 / alpha, with ``alpha`` and its inverse (1, C, 1)."""

    alpha: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class ResidualBlock:
    """Pairs of convolutions, a Snake before each; in half precision they add to a sum in fp32."""

    steps: tuple[tuple[Snake, Convolution, Snake, Convolution], ...]

    @property
    def channels_last(self) -> bool:
        """How its activations lie."""
        return self.steps[0][1].channels_last


@dataclass(frozen=True)
class Upsampling:
    """One resolution: upsample, add the source at that resolution, average the residual blocks."""

    up: Convolution
    source_down: Convolution
    source_block: ResidualBlock
    blocks: tuple[ResidualBlock, ...]

    @property
    def stride(self) -> int:
        """Frames of this resolution for each one of the resolution before."""
        return self.up.options["stride"][0]


@dataclass(frozen=True)
class NetworkWeights:
    """Everything that ``decode`` reads; ``slope``: of the rectifiers before the upsamplings."""

    before: Convolution
    levels: tuple[Upsampling, ...]
    after: Convolution
    slope: float

    @property
    def channels_last(self) -> bool:
        """How the activations lie."""
        return self.before.channels_last


def decode(weights: NetworkWeights, mel: Tensor, spectrum: Tensor, valid: Sequence[Tensor], scratch: Scratch) -> Tensor:
    """(B, n_fft + 2, F) of mel frames (B, 80, T) and the source's spectrum (B, n_fft + 2, F), all fp32.

    Args:
        valid: (B, 1, n) bool of every resolution, that of the mel frames first; empty where nothing is padding.
        scratch: memory for activations.
    """
    if weights.channels_last:
        mel, spectrum = _channels_last(mel), _channels_last(spectrum)
    x, last = convolve(weights.before, mel), len(weights.levels) - 1
    seen, *others = valid or [None] * (last + 2)
    for index, level in enumerate(weights.levels):
        x = convolve(level.up, _keep(F.leaky_relu_(x, weights.slope), seen))
        if index == last:
            x = _channels_last(x, reflect=1) if weights.channels_last else F.pad(x, (1, 0), mode="reflect")
        seen = others[index]
        x += _residual(level.source_block, convolve(level.source_down, spectrum), scratch, seen)
        total = _residual(level.blocks[0], x.clone(), scratch, seen)
        for block in level.blocks[1:]:
            total += _residual(block, x.clone(), scratch, seen)
        x = total.div_(len(level.blocks))
    return convolve(weights.after, _keep(F.leaky_relu_(x), seen))


def convolve(convolution: Convolution, x: Tensor, surrounded: bool = False) -> Tensor:
    """(B, out, n) of x (B, in, T); ``surrounded``: x has the zeros around it that the convolution would add."""
    weight, bias, options = convolution.weight, convolution.bias, convolution.options
    if convolution.pieces:
        kernels = _kernels_for(x) if convolution.channels_last and bias is not None else None
        if kernels is not None:
            return by_product(x, weight, bias, options, kernels)
        return in_pieces(x, weight, bias, options, convolution.channels_last)
    if convolution.transposed:
        result = F.conv_transpose1d(x, weight, bias, **options)
        return _channels_last(result) if convolution.channels_last else result
    if not convolution.channels_last:
        return F.conv1d(x, weight, bias, **options)
    # as images of one line: of one dimension, torch copies what lies so before it convolves
    sizes = {name: (1, *options[name]) for name in ("stride", "dilation")}
    padding = (0, 0 if surrounded else options["padding"][0])
    made = F.conv2d(x[:, :, None], weight[:, :, None], bias, padding=padding, groups=options["groups"], **sizes)
    return made[:, :, 0]


def _channels_last(x: Tensor, reflect: int = 0) -> Tensor:
    """A copy of x (B, C, T) in which the channels of a moment lie side by side.

    Args:
        reflect: moments behind the first that are mirrored before it.
    """
    rows, channels, length = x.shape
    result = x.new_empty(rows, reflect + length, channels).transpose(1, 2)
    result[:, :, reflect:] = x
    if reflect:
        result[:, :, :reflect] = x[:, :, 1 : reflect + 1].flip(2)
    return result


def _resolutions(weights: NetworkWeights, length: int) -> list[int]:
    """Frames of every resolution, that of the mel frames first."""
    lengths = [length]
    for level in weights.levels:
        lengths.append(level.stride * lengths[-1])
    lengths[-1] += 1  # the reflected one
    return lengths


def _masks(weights: NetworkWeights, ends: Tensor, total: int) -> list[Tensor]:
    """(B, 1, n) bool of every resolution, for utterances in ``total`` frames that end at ``ends`` (resolutions, B)."""
    totals = _resolutions(weights, total)
    places = torch.arange(max(totals), device=ends.device)[None, None]
    return [places[..., :n] < end[:, None, None] for n, end in zip(totals, ends, strict=True)]


def _keep(x: Tensor, valid: Tensor | None) -> Tensor:
    """x, in place, with zeros where it is not valid."""
    return x if valid is None else x.mul_(valid)


def _residual(block: ResidualBlock, x: Tensor, scratch: Scratch, valid: Tensor | None) -> Tensor:
    """x, in place."""
    last, more = block.channels_last, None
    for first_activation, first, second_activation, second in block.steps:
        h = _convolved(first_activation, first, x, None, scratch, valid, more)
        more = _convolved(second_activation, second, h, None if last else h, scratch, valid)
    return x.add_(more)


def _convolved(
    snake: Snake,
    convolution: Convolution,
    x: Tensor,
    out: Tensor | None,
    scratch: Scratch,
    valid: Tensor | None,
    more: Tensor | None = None,
) -> Tensor:
    """The convolution of what Snake makes of x + ``more``, which x becomes; ``out``: where that goes, or anywhere."""
    last, (rows, channels, length) = convolution.channels_last, x.shape
    if not last:
        out = scratch("activated", x.shape, convolution.direction.dtype, x.device) if out is None else out
        return convolve(convolution, _keep(_snake(snake, x, out, last, scratch, more), valid))
    # with the convolution's zeros around it: where those are its own to add, oneDNN compiles more for each new length
    # (those of all residual blocks 0.35 s, and 0.03 so)
    (beside,) = convolution.options["padding"]
    whole = scratch("activated", (rows, length + 2 * beside, channels), convolution.direction.dtype, x.device)
    whole[:, :beside], whole[:, beside + length :] = 0.0, 0.0
    whole = whole.transpose(1, 2)
    _keep(_snake(snake, x, whole.narrow(2, beside, length), last, scratch, more), valid)
    return convolve(convolution, whole, surrounded=True)


def _snake(
    snake: Snake, x: Tensor, out: Tensor, channels_last: bool, scratch: Scratch, more: Tensor | None = None
) -> Tensor:
    """``out``: of x + ``more``, which x becomes; what lies between stays in the cache."""
    kernels = _kernels_for(x, out) if channels_last else None
    if kernels is not None:
        parts = (x, out) if more is None else (x, out, more)
        function = kernels.activate if more is None else kernels.add_and_activate
        factors = array(snake.alpha.flatten()), array(snake.inverse.flatten())
        with kernel_threads():
            for row in zip(*(part.transpose(1, 2) for part in parts), strict=True):
                function(*map(array, row), *factors)
        return out
    if more is not None:
        x += more
    # some channels at once, or some moments; a compiler fuses the whole
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    axis = 2 if channels_last else 1
    step = max(1, PART * x.size(axis) // (x.numel() * x.element_size())) if on_cpu else x.size(axis)
    for at in range(0, x.size(axis), step):
        some, to = (part.narrow(axis, at, min(step, x.size(axis) - at)) for part in (x, out))
        alpha, inverse = (
            part if channels_last else part.narrow(1, at, some.size(1)) for part in (snake.alpha, snake.inverse)
        )
        between = scratch("between", some.shape, snake.alpha.dtype, x.device)
        torch.mul(some, alpha, out=between)
        between.sin_().square_().mul_(inverse)
        torch.add(some, between, out=to)
    return out


def _kernels_for(*activations: Tensor) -> ModuleType | None:
    """Kernels for activations with channels last, where there are some."""
    known = all(x.device.type == "cpu" and x.dtype in _KERNEL_FORMATS for x in activations)
    return _kernels() if known and not torch.compiler.is_compiling() else None


@functools.cache
def _kernels() -> ModuleType | None:
    if why_no_kernels():
        return None
    from ..cpu import vocoder_kernels

    return vocoder_kernels


def prepare(weights: NetworkWeights) -> None:
    """Compile what activations need: seconds where no process has done it before."""
    if not weights.channels_last:
        return
    mel = weights.before.direction.new_zeros(1, weights.before.direction.size(1), 1)
    source = weights.levels[0].source_down.direction
    frames = math.prod(level.stride for level in weights.levels) + 1
    decode(weights, mel, source.new_zeros(1, source.size(1), frames), (), Scratch())


class Network(GraphedNetwork):
    """``decode`` for one utterance or several; ``function`` is ``decode``, or what a compiler has made of it."""

    longest = 512

    def __init__(
        self,
        weights: NetworkWeights,
        disable: bool = True,
        function: Callable[..., Tensor] = decode,
        addresses: Callable[[], Hashable] = lambda: (),
    ):
        super().__init__(weights, disable, function, addresses)

    def _run(self, key: tuple, mel: Tensor, spectrum: Tensor, *ends: Tensor) -> Tensor:
        valid = _masks(self.weights, ends[0], mel.size(2)) if ends else ()
        return self._function(self.weights, mel, spectrum, valid, self._scratch)

    def __call__(self, mel: Tensor, spectrum: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """(B, n_fft + 2, F) fp32: logarithmic magnitudes, then phases; with graphs, a static buffer.

        Args:
            mel: (B, 80, T) fp32, zeros behind the end of an utterance.
            spectrum: (B, n_fft + 2, F) fp32 of the source, likewise.
            lengths: frames of each utterance; ``None`` where all have T. What comes behind them means nothing.
        """
        rows, frames, last = mel.size(0), mel.size(2), spectrum.size(2)
        runner, total = self._choose(rows, frames)
        lengths, ends = lengths or [frames] * rows, ()
        if runner is self.runner or any(length < total for length in lengths):
            by_resolution = zip(*(_resolutions(self.weights, length) for length in lengths), strict=True)
            ends = (on_device(torch.tensor(list(by_resolution)), mel.device),)
        if total > frames:
            scale = math.prod(level.stride for level in self.weights.levels)
            mel, spectrum = F.pad(mel, (0, total - frames)), F.pad(spectrum, (0, scale * (total - frames)))
        return runner((total, rows, bool(ends)), mel, spectrum, *ends)[:, :, :last]
