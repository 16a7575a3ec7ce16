"""One utterance on its way, and the random numbers that are its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ..runtime.device import random_state


class Draws:
    """The random numbers that an utterance would draw alone, after ``torch.manual_seed(seed)``.

    Args:
        device: of the model.

    Attributes:
        seed: what they began with.
        states: of the generators, as ``random_state.states`` has them.
    """

    def __init__(self, device: torch.device, seed: int):
        self._device, self.seed = device, seed
        with random_state.kept(device):
            random_state.seed(device, seed)
            self.states = random_state.states(device)

    @contextmanager
    def own(self) -> Iterator[None]:
        """In the body the default generators go on with these numbers; after it they are what they were."""
        with random_state.kept(self._device):
            random_state.restore_all(self._device, self.states)
            try:
                yield
            finally:
                self.states = random_state.states(self._device)

    def generator(self) -> Generator:
        """A generator of the model's device that goes on with these numbers; ``resume`` takes it back."""
        host, device = self.states
        generator = Generator(self._device)
        generator.set_state(host if device is None else device)
        return generator

    def resume(self, generator: Generator) -> None:
        """Go on where a generator is."""
        host, device = self.states
        drawn = generator.get_state()
        self.states = (drawn, None) if device is None else (host, drawn)


@dataclass
class Utterance:
    """One request, and what the stages have made of it so far.

    Attributes:
        number: its place among those that were asked for.
        given: the arguments of ``generate``, by name.
        voice: what it is spoken with; this utterance's own copy.
        limit: speech tokens at most, where that is less than the model's own limit.
        tokens: (n,) int64, as the acoustic half gets them.
        end: why they have ended, as ``runtime.t3.requests.Token.end``.
        timed: are the times of its words wanted? Then, where the family of the model has an alignment:
        attention: (n, S) float32, of each speech token over the text, as ``runtime.t3.requests.Token.attention``.
        spelling: the S text tokens, as they are written in the vocabulary.
    """

    number: int
    given: dict[str, Any]
    voice: Any
    draws: Draws
    limit: int | None = None
    tokens: Tensor | None = None
    end: str = ""
    timed: bool = False
    attention: Tensor | None = None
    spelling: Sequence[str] = ()
