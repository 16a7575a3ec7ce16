"""Encoded reference voices, kept by the content of their recordings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import forks


@dataclass(frozen=True)
class Voice:
    """What a reference voice is to the two halves of a model: tensors (or ``None``) by name.

    ``t3``: conditions of the token model, without those that change from call to call (exaggeration). ``gen``: the
    reference of the acoustic half.
    """

    t3: dict[str, Any]
    gen: dict[str, Any]

    def copy(self) -> Voice:
        """Own dictionaries with own tensors, ordinary ones whatever mode the caller is in."""
        with torch.inference_mode(False), torch.no_grad():
            return Voice(_cloned(self.t3), _cloned(self.gen))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        values = (*self.t3.values(), *self.gen.values())
        return sum(value.numel() * value.element_size() for value in values if torch.is_tensor(value))


def _cloned(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in values.items()}


class VoiceCache:
    """Voices by key, the one not used for longest out first, bounded by the bytes of their tensors.

    What goes in and what comes out are copies: upstream's ``generate`` writes into the voice that it is given. Safe to
    use from several threads.

    Attributes:
        limit: bytes of tensors that are kept at most; 0 keeps nothing.
        hits, misses: how often a voice was found, or not.
    """

    def __init__(self, limit: int):
        self.limit, self.hits, self.misses = limit, 0, 0
        self._voices: OrderedDict[Hashable, Voice] = OrderedDict()
        self._nbytes = 0
        self._lock = forks.lock()

    def get(self, key: Hashable) -> Voice | None:
        """A copy of the voice, or ``None``."""
        with self._lock:
            voice = self._voices.get(key)
            if voice is None:
                self.misses += 1
                return None
            self.hits += 1
            self._voices.move_to_end(key)
        return voice.copy()

    def put(self, key: Hashable, voice: Voice) -> None:
        """Keep a copy, unless it alone exceeds the limit."""
        size = voice.nbytes
        if size > self.limit:
            return
        voice = voice.copy()
        with self._lock:
            self._drop(key)
            self._voices[key] = voice
            self._nbytes += size
            while self._nbytes > self.limit:
                self._drop(next(iter(self._voices)))

    def clear(self) -> None:
        """Forget every voice; the counters stay."""
        with self._lock:
            self._voices.clear()
            self._nbytes = 0

    def _drop(self, key: Hashable) -> None:
        voice = self._voices.pop(key, None)
        self._nbytes -= voice.nbytes if voice is not None else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._voices)

    def __str__(self) -> str:
        kept = f"{len(self)} kept ({self.nbytes / 2**20:.1f} of {self.limit / 2**20:.1f} MiB)"
        return f"{kept}, {self.hits} found, {self.misses} encoded"
