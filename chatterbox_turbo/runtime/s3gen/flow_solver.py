"""Euler's method for flow matching: noise to mel frames along the velocity, with or without guidance."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..device.attention_kernels import Kernel
from . import attention as flow_attention
from . import tiled_block
from .attention import hiding
from .flow_estimator import Constant, EstimatorWeights, constant, velocity
from .frames import Conv, valid_frames, whole_blocks
from .graphed import GraphedNetwork


class FlowSolver(GraphedNetwork):
    """Solves for one utterance or several.

    Args:
        function: ``velocity``, or what a compiler has made of it.
        kernel: of attention; ``None``: what is fastest.
    """

    longest = 2048

    def __init__(
        self,
        weights: EstimatorWeights,
        disable: bool = True,
        function: Callable[..., Tensor] = velocity,
        addresses: Callable[[], Hashable] = lambda: (),
        kernel: Kernel | None = None,
    ):
        if kernel is None:
            flow_attention.prepare(weights.dtype, weights.device)
        tiled_block.prepare(block for stage in weights.stages for block in stage.blocks)
        self._kernel = kernel
        super().__init__(weights, disable, function, addresses)

    def _run(
        self, key: tuple, state: Tensor, first: Tensor, shortcut: Tensor, times: Tensor, factors: Tensor, *bias: Tensor
    ) -> Tensor:
        """The next state (B, T, 80): each velocity times its factor is added to the one before."""
        start = Constant(first, shortcut)
        hidden = bias[0] if bias else None
        moved = self._function(self.weights, state, start, times, hidden, self._scratch, self._kernel)
        for part, factor in zip(moved.split(state.size(0)), factors, strict=False):
            state = torch.addcmul(state, part, factor)
        return state

    def solve(
        self,
        noise: Tensor,
        times: Tensor,
        projections: Tensor,
        mean: Tensor,
        speaker: Tensor,
        condition: Tensor,
        lengths: Sequence[int] | None = None,
        guidance: float | None = None,
        guided_steps: int | None = None,
    ) -> Tensor:
        """The state at the last time, (B, 80, T) in the dtype of ``noise``; frames past a length mean nothing.

        The state is fp32 throughout. With guidance w the velocity is (1 + w) v(given) - w v(nothing given)
        (classifier-free guidance, 2022), in one batch of 2 B.

        Args:
            noise, mean, condition: (B, 80, T); ``mean`` is the encoder's output, ``condition`` the prompt's mel.
            times: (S + 1,) fp32, from 0 to 1, on the device.
            projections: (S, stages, C) fp32, the time of each step as each resnet reads it.
            speaker: (B, 80).
            lengths: frames of each utterance; ``None`` where all have T.
            guidance: w; ``None`` for a model without guidance (mean flow).
            guided_steps: steps from the first on that are guided; the others cost half. All where it is ``None``.
        """
        rows, frames, steps = noise.size(0), noise.size(2), len(times) - 1
        lengths = [frames] * rows if lengths is None else lengths
        runner, total = self._choose(rows, frames, calls=steps)
        total = whole_blocks(total, self.weights.dtype, noise.device)
        valid = valid_frames(lengths, total, noise.device)
        if valid is None and runner is self.runner:  # one graph a length
            valid = noise.new_ones((rows, total), dtype=torch.bool)
        state, mean, condition = (_rows(part, total - frames) for part in (noise, mean, condition))
        if any(length < frames for length in lengths):
            mean, condition = mean * valid[..., None], condition * valid[..., None]
        start = constant(self.weights, mean, speaker.float(), condition)
        moves = times.diff()[:, None]
        alone = (start, moves, _bias(valid, 1, self.weights.dtype))
        guided = alone
        if guidance is not None:
            both = Constant(
                _and_nothing(start.first, self.weights.given),
                _and_nothing(start.shortcut, self.weights.given_shortcut),
            )
            factors = torch.cat([moves * (1.0 + guidance), moves * -guidance], dim=1)
            guided = (both, factors, _bias(valid, 2, self.weights.dtype))
        for index in range(steps):
            used, factors, bias = guided if guided_steps is None or index < guided_steps else alone
            key = (total, used.first.size(0), rows, bool(bias))
            state = runner(key, state, used.first, used.shortcut, projections[index], factors[index], *bias)
        # cloned, because the last state is a graph's buffer
        return state[:, :frames].clone().transpose(1, 2).to(noise.dtype)


def _rows(x: Tensor, padding: int) -> Tensor:
    """(B, 80, T) to (B, T + padding, 80) fp32."""
    return torch.nn.functional.pad(x.transpose(1, 2).float(), (0, 0, 0, padding)).contiguous()


def _and_nothing(x: Tensor, conv: Conv) -> Tensor:
    """(2 B, T, C) of ``x`` (B, T, C), and of what ``conv`` makes of zeros, which is its bias."""
    nothing = torch.zeros_like(x) if conv.bias is None else conv.bias.to(x.dtype).expand_as(x)
    return torch.cat([x, nothing])


def _bias(valid: Tensor | None, times: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What hides frames (R, T) from attention, for ``times`` R rows; nothing where all are seen."""
    return () if valid is None else (hiding(valid.repeat(times, 1), dtype),)


def schedule(steps: int, cosine: bool, device: torch.device) -> Tensor:
    """(steps + 1,) fp32 times from 0 to 1: even, or denser at the beginning (upstream's ``t_scheduler``)."""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float32, device=device)
    return 1 - torch.cos(times * 0.5 * torch.pi) if cosine else times
