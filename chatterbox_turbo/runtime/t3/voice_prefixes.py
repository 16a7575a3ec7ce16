"""What the positions of a voice leave in the cache, kept for the next request with it (prefix caching; vLLM, SGLang).

A prefix begins with the voice, and no position sees what is behind it, so that its keys and values do not depend on the
text. GPT-2's voices take 376 positions, where a sentence takes 30.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 128  # positions: Llama's 34 are computed as soon as they are copied


@dataclass(frozen=True, eq=False)
class VoicePrefix:
    """Embeddings (1, n, D), and the keys and values (L, H, n, Dh) of these positions in the format of the cache."""

    embeds: Tensor
    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """n."""
        return self.embeds.size(1)

    @property
    def nbytes(self) -> int:
        """Of all three."""
        return self.embeds.nbytes + self.keys.nbytes + self.values.nbytes


class VoicePrefixes:
    """Those of the voices that were used last, within ``limit`` bytes.

    They belong to weights that do not change: whoever changes them makes new ones.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: list[VoicePrefix] = []  # the one used last is the last

    @property
    def nbytes(self) -> int:
        """Of those that are there."""
        return sum(one.nbytes for one in self._kept)

    def get(self, embeds: Tensor, make: Callable[[Tensor], VoicePrefix]) -> VoicePrefix:
        """That of the voice (1, n, D), made where it is not there; it is the same either way."""
        for one in self._kept:
            if torch.equal(one.embeds, embeds):
                self._kept.remove(one)
                break
        else:
            one = make(embeds)
        self._kept.append(one)
        while self.nbytes > self.limit:
            self._kept.pop(0)
        return one

    def clear(self) -> None:
        """Let go of all."""
        self._kept.clear()
