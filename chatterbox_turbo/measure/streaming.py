"""What streamed speech is against speech in one call: tests and ``benchmarks/streaming.py`` use the same functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..runtime.s3gen.drawn import Drawn

NEAR = 240  # samples on either side of a seam, 10 ms


def given(numbers: Tensor, unit: int = 1) -> Drawn:
    """An utterance's random numbers (1, C, n) that are there already, for both sides of a comparison."""
    taken = 0

    def draw(n: int) -> Tensor:
        nonlocal taken
        taken += n
        return numbers[..., taken - n : taken]

    return Drawn(draw, unit)


def seam(samples: Tensor, lengths: Sequence[int]) -> float:
    """The largest step at a seam of blocks, over the largest step within 10 ms of it.

    Args:
        samples: (n,) of all blocks.
        lengths: samples of each block.
    """
    steps, worst = samples.diff().abs(), 0.0
    for end in list(accumulate(lengths))[:-1]:
        around = torch.cat([steps[max(0, end - NEAR) : end - 2], steps[end + 1 : end + NEAR]])
        worst = max(worst, (steps[end - 2 : end + 1].max() / around.max().clamp(min=1e-9)).item())
    return worst
