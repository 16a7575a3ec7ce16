"""Voices between voices: means of speaker embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-3  # length of a mean of unit vectors, below which they cancel each other


def mean_direction(embeddings: Sequence[Tensor], shares: Sequence[float]) -> Tensor | None:
    """The direction between embeddings, with the mean of their lengths; ``None`` where there is none.

    Embeddings of speakers are compared by their angle: the voice encoder's have length 1, and the flow normalizes the
    x-vector. So each counts by its direction, not by its length, and the mean, which is shorter, is scaled again.

    Args:
        embeddings: (1, D) float32 each.
        shares: weights, of sum 1.

    Returns:
        (1, D) float32.
    """
    stacked = torch.cat(list(embeddings)).double()
    lengths, weights = stacked.norm(dim=1, keepdim=True), torch.tensor(shares, dtype=torch.float64)[:, None]
    mean = (weights * stacked / lengths.clamp(min=1e-12)).sum(dim=0, keepdim=True)
    if float(mean.norm()) < SMALLEST:
        return None
    return (mean / mean.norm() * (weights * lengths).sum()).float()
