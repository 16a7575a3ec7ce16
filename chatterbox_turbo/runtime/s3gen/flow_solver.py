"""Euler's method for flow matching: noise to mel frames along the velocity, with or without guidance."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..device.graphs import GraphRunner
from . import attention as flow_attention
from .flow_estimator import Constant, EstimatorWeights, constant, velocity
from .frames import valid_frames
from .scratch import Scratch

BUCKET = 64  # frames (1.3 s): lengths for which graphs are captured
MAX_GRAPHS = 16


class FlowSolver:
    """Solves for one utterance or several; buffers and graphs are kept from call to call.

    Graphs are for single utterances: several have enough work to hide the launches, in shapes that seldom come again.

    Args:
        weights: of the estimator.
        disable: no CUDA graphs.
        function: ``velocity``, or what a compiler has made of it.
        addresses: fingerprint of the weights for ``GraphRunner``.
    """

    def __init__(
        self,
        weights: EstimatorWeights,
        disable: bool = True,
        function: Callable[..., Tensor] = velocity,
        addresses: Callable[[], Hashable] = lambda: (),
    ):
        flow_attention.prepare(weights.dtype, weights.device)
        self.weights, self._scratch, self._bucket = weights, Scratch(), 1 if disable else BUCKET

        def run(key: tuple, state: Tensor, first: Tensor, shortcut: Tensor, times: Tensor, *valid: Tensor) -> Tensor:
            start, seen = Constant(first, shortcut), valid[0] if valid else None
            return function(self.weights, state, start, times, seen, self._scratch)

        self.runner = GraphRunner(run, disable=disable, addresses=addresses, max_graphs=MAX_GRAPHS)
        self._eager = GraphRunner(run, disable=True)

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
            times: (S + 1,) fp32, from 0 to 1.
            projections: (S, stages, C) fp32, the time of each step as each resnet reads it.
            speaker: (B, 80).
            lengths: frames of each utterance; ``None`` where all have T.
            guidance: w; ``None`` for a model without guidance (mean flow).
            guided_steps: steps from the first on that are guided; the others cost half. All where it is ``None``.
        """
        dtype, frames = noise.dtype, noise.size(2)
        padding = -frames % self._bucket if noise.size(0) == 1 else 0
        lengths = [frames] * noise.size(0) if lengths is None else lengths
        valid = valid_frames(lengths, frames + padding, noise.device)
        state, mean, condition = (_rows(part, padding) for part in (noise, mean, condition))
        if valid is not None:
            mean, condition = mean * valid[..., None], condition * valid[..., None]
        start = constant(self.weights, mean, speaker.float(), condition)
        both = start
        if guidance is not None:
            nothing = constant(self.weights, *(torch.zeros_like(part[:1]) for part in (mean, speaker.float(), mean)))
            both = Constant(*(torch.cat([a, b.expand_as(a)]) for a, b in _pairs(start, nothing)))
        steps = [float(step) for step in times.diff().tolist()]
        for index, step in enumerate(steps):
            guided = guidance is not None and (guided_steps is None or index < guided_steps)
            used, seen = (both, _twice(valid)) if guided else (start, valid)
            moved = self._velocity(state, used, projections[index], seen)
            if guided:
                given, alone = moved.chunk(2)
                moved = (1.0 + guidance) * given - guidance * alone
            state = state + step * moved
        return state[:, :frames].transpose(1, 2).to(dtype)

    def _velocity(self, state: Tensor, start: Constant, times: Tensor, valid: Tensor | None) -> Tensor:
        masks = () if valid is None else (valid,)
        key = (*start.first.shape[:2], state.size(0), bool(masks))
        runner = self.runner if state.size(0) == 1 else self._eager
        return runner(key, state, start.first, start.shortcut, times, *masks)

    def release(self) -> None:
        """Give buffers and graphs back."""
        self._scratch.release()
        self.runner.reset()


def _rows(x: Tensor, padding: int) -> Tensor:
    """(B, 80, T) to (B, T + padding, 80) fp32."""
    return torch.nn.functional.pad(x.transpose(1, 2).float(), (0, 0, 0, padding)).contiguous()


def _twice(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.repeat(2, 1)


def _pairs(a: Constant, b: Constant) -> tuple[tuple[Tensor, Tensor], ...]:
    return (a.first, b.first), (a.shortcut, b.shortcut)


def schedule(steps: int, cosine: bool, device: torch.device) -> Tensor:
    """(steps + 1,) fp32 times from 0 to 1: even, or denser at the beginning (upstream's ``t_scheduler``)."""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float32, device=device)
    return 1 - torch.cos(times * 0.5 * torch.pi) if cosine else times
