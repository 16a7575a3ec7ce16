"""What the flow solver and the vocoder's network share: weights, memory, and CUDA graphs at lengths where they pay.

A replay saves the launches of a function, and a capture costs what thirty replays save: torch collects garbage and
empties its cache before it, the function runs for warm-up, the graph is instantiated. So a length gets its graph once
it has lost as much without one (the ski rental rule: at most twice what hindsight would pay), lengths are few, and the
longest get none. What runs without a graph is not padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..device.graphs import GraphRunner
from .scratch import Scratch

STEP, PARTS = 16, 8  # lengths are multiples of the one; so many lie between a power of two and the next
MAX_GRAPHS = 24  # as many as there are lengths from 1 to 512, or from 256 to 2048
# about 0.1 s for a capture; 700 kernels are launched in 3 ms less by a replay
PAYS_AFTER = 32


def bucketed(frames: int) -> int:
    """The length for which a graph is captured: at most an eighth more, from 128 frames on."""
    step = max(STEP, (1 << (frames - 1).bit_length()) // (2 * PARTS))
    return -(-frames // step) * step


class GraphedNetwork:
    """A function over the frames of one utterance or several; buffers and graphs are kept from call to call.

    Graphs are for single utterances: several have enough work to hide the launches, in shapes that seldom come again.

    Args:
        weights: that ``function`` reads.
        disable: no CUDA graphs.
        function: what computes, or what a compiler has made of it.
        addresses: fingerprint of the weights for ``GraphRunner``.

    Attributes:
        longest: frames beyond which a kernel takes longer than its launch.
        pays_after: calls of a length without a graph before it gets one.
        runner: its keys begin with the number of frames.
    """

    longest = 0
    pays_after = PAYS_AFTER

    def __init__(self, weights: Any, disable: bool, function: Callable[..., Tensor], addresses: Callable[[], Hashable]):
        self.weights, self._function, self._scratch = weights, function, Scratch()
        self.runner = GraphRunner(self._run, disable=disable, addresses=addresses, max_graphs=MAX_GRAPHS)
        self._eager = GraphRunner(self._run, disable=True)
        self._spent: Counter[int] = Counter()
        if disable:
            self.longest = 0

    def _run(self, key: tuple, *inputs: Tensor) -> Tensor:
        """The function for one key, as ``GraphRunner`` calls it."""
        raise NotImplementedError

    def _choose(self, rows: int, frames: int, calls: int = 1) -> tuple[GraphRunner, int]:
        """What runs the next ``calls`` calls, and the frames to pad to: as many as there are where it is not graphs."""
        length = bucketed(frames)
        if rows == 1 and length <= self.longest and self._pays(length, calls):
            return self.runner, length
        return self._eager, frames

    def _pays(self, length: int, calls: int) -> bool:
        if any(key[0] == length for key in self.runner.captured):
            return True
        if any(key[0] == length for key in self.runner.fallbacks):
            return False
        spent = self._spent.pop(length, 0)  # a graph that is dropped has to be earned again
        if spent >= self.pays_after:
            return True
        self._spent[length] = spent + calls
        return False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In the body a length gets its graph at its first call, as it will come often."""
        self.pays_after = 0
        try:
            yield
        finally:
            del self.pays_after

    def release(self) -> None:
        """Give buffers and graphs back."""
        self._scratch.release()
        self.runner.reset()
