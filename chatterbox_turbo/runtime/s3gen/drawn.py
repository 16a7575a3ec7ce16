"""Random numbers of one utterance that is computed in windows: each is drawn once, in order, and read several times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Drawn:
    """A sequence of random numbers along the last dimension, of which windows are read from left to right.

    They come from ``draw`` in units of one size, so that windows do not change what a generator gives.

    Args:
        draw: n to numbers (1, C, n), the next ones of the utterance.
        unit: numbers of one draw.
    """

    def __init__(self, draw: Callable[[int], Tensor], unit: int):
        self._draw, self._unit = draw, unit
        self._first, self._kept = 0, draw(0)

    def between(self, begin: int, end: int) -> Tensor:
        """(1, C, end - begin); what lies before a ``forget`` is gone."""
        if begin < self._first:
            raise ValueError(f"Number {begin} is forgotten: the first one that is kept is {self._first}.")
        missing = end - self._first - self._kept.size(-1)
        parts = [self._draw(self._unit) for _ in range(-(-missing // self._unit))]
        if parts:
            self._kept = torch.cat([self._kept, *parts], dim=-1)
        return self._kept[..., begin - self._first : end - self._first]

    def forget(self, before: int) -> None:
        """Let go of what lies before ``before``."""
        count = min(max(0, before - self._first), self._kept.size(-1))
        if count:
            self._first, self._kept = self._first + count, self._kept[..., count:].clone()


def seeded(channels: int, unit: int, device: torch.device, seed: int) -> Drawn:
    """Normal numbers (1, channels, n) of a generator of their own, whatever else draws meanwhile."""
    generator = torch.Generator(device).manual_seed(seed)
    return Drawn(lambda n: torch.randn(1, channels, n, generator=generator, device=device), unit)
