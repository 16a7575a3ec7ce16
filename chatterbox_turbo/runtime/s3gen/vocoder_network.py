"""The convolutions of HiFTNet (2023) between its two transforms: mel frames and the source's spectrum to a spectrum.

Activations are in place, and on a CPU in parts that fit a cache. A length can be padded to one for which there is a
graph: behind the end of an utterance every convolution reads zeros, as it does where the utterance ends by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.upsampling import in_pieces
from ..device.devices import on_device
from .graphed import GraphedNetwork
from .scratch import Scratch

PART = 2**19  # bytes of an activation at once


@dataclass(frozen=True)
class Convolution:
    """A convolution over time, or a transposed one.

    Attributes:
        direction: the weight, or where there is a ``magnitude``, what weight normalization (2016) scales to it.
        options: stride, padding, dilation.
        pieces: a transposed one is computed in pieces (``cpu.upsampling``).
    """

    direction: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    options: dict[str, Any]
    transposed: bool = False
    pieces: bool = False

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


def decode(weights: NetworkWeights, mel: Tensor, spectrum: Tensor, valid: Sequence[Tensor], scratch: Scratch) -> Tensor:
    """(B, n_fft + 2, F) of mel frames (B, 80, T) and the source's spectrum (B, n_fft + 2, F), all fp32.

    Args:
        valid: (B, 1, n) bool of every resolution, that of the mel frames first; empty where nothing is padding.
        scratch: memory for activations.
    """
    x, last = convolve(weights.before, mel), len(weights.levels) - 1
    seen, *others = valid or [None] * (last + 2)
    for index, level in enumerate(weights.levels):
        x = convolve(level.up, _keep(F.leaky_relu_(x, weights.slope), seen))
        if index == last:
            x = F.pad(x, (1, 0), mode="reflect")
        seen = others[index]
        x += _residual(level.source_block, convolve(level.source_down, spectrum), scratch, seen)
        total = _residual(level.blocks[0], x.clone(), scratch, seen)
        for block in level.blocks[1:]:
            total += _residual(block, x.clone(), scratch, seen)
        x = total.div_(len(level.blocks))
    return convolve(weights.after, _keep(F.leaky_relu_(x), seen))


def convolve(convolution: Convolution, x: Tensor) -> Tensor:
    """(B, out, n) of x (B, in, T)."""
    if convolution.pieces:
        return in_pieces(x, convolution.weight, convolution.bias, convolution.options)
    function = F.conv_transpose1d if convolution.transposed else F.conv1d
    return function(x, convolution.weight, convolution.bias, **convolution.options)


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
    for first_activation, first, second_activation, second in block.steps:
        activated = scratch("activated", x.shape, first.direction.dtype, x.device)
        h = convolve(first, _keep(_snake(first_activation, x, activated, scratch), valid))
        x += convolve(second, _keep(_snake(second_activation, h, h, scratch), valid))
    return x


def _snake(snake: Snake, x: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
    """Some channels at once, so that what lies between x and ``out`` stays in the cache."""
    parts = x.device.type == "cpu" and not torch.compiler.is_compiling()  # a compiler fuses the whole
    rows = max(1, PART // (x.size(0) * x.size(2) * x.element_size())) if parts else x.size(1)
    for at in range(0, x.size(1), rows):
        part = slice(at, at + rows)
        some = x[:, part]
        between = scratch("between", some.shape, snake.alpha.dtype, x.device)
        torch.mul(some, snake.alpha[:, part], out=between)
        between.sin_().square_().mul_(snake.inverse[:, part])
        torch.add(some, between, out=out[:, part])
    return out


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
