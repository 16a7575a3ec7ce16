"""The attention over their texts that running requests have had, for those that want it: times of words come of it.

Nothing is kept, allocated or launched where no running request wants it.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class AttentionHistory:
    """Rows of attention of N requests by step, on the device, in the order of the requests' places.

    It is one static tensor (N, F, W) float32, F steps of W text tokens: 4 bytes for each pair of a speech and a text
    token, 0.5 to 1 MB for a request of 1000 speech tokens. Nothing here waits for the device.

    Args:
        device: where it is kept. Off a CPU the memory stays for the next call, as graphs hold its address.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._wanted: list[bool] = []  # by place
        self._values: Tensor | None = None
        self._places: Tensor | None = None

    @property
    def on(self) -> bool:
        """Whether a running request wants its rows."""
        return any(self._wanted)

    def begin(self) -> None:
        """Forget everything."""
        self._wanted = []
        self._rest()

    def admit(self) -> None:
        """A request more, which wants nothing."""
        self._wanted.append(False)

    def keep(self, rows: int, steps: int, width: int) -> None:
        """The last request wants its rows, of so many steps and text tokens at most; there are ``rows`` places."""
        self._wanted[-1] = True
        self._fit(rows, steps + 1, width)  # a captured step goes on behind the last token

    def make_room(self, rows: int) -> None:
        """There are so many places now."""
        if self._values is not None:
            self._fit(rows, *self._values.shape[1:])

    def write(self, steps: Tensor, seen: Tensor) -> None:
        """The rows (N, W or more) float32 of every place, each at its own step (N,) int64 from 1 on."""
        values, count = self._values, seen.size(0)
        # places without a request count on; what they write is at no step that is read
        values[self._places[:count], steps.clamp(max=values.size(1) - 1)] = seen[:, : values.size(2)]

    def rows(self, number: int, steps: int, length: int) -> Tensor:
        """(steps, length) float32, a copy. The first row is zeros: there is no attention of the prefill."""
        return self._values[number, :steps, :length].clone()

    def leave(self, number: int) -> None:
        """A request goes; the last one takes its place."""
        last = self._wanted.pop()
        if number < len(self._wanted):
            self._wanted[number] = last
            if last:
                self._values[number] = self._values[len(self._wanted)]
        self._rest()

    def memory(self) -> Hashable:
        """Which memory is written to, and its shape; ``None`` where none is."""
        return (self._values.data_ptr(), *self._values.shape) if self.on else None

    def _rest(self) -> None:
        if not self.on and self._device.type == "cpu":
            self._values = self._places = None

    @torch.inference_mode(False)  # ordinary tensors can be written inside and outside of inference mode
    def _fit(self, rows: int, steps: int, width: int) -> None:
        old = self._values
        size = (rows, steps, width)
        if old is not None:
            size = tuple(map(max, size, old.shape))
            if size == tuple(old.shape):
                return
        # on a CPU memory is taken where something is written, and not before
        self._values = torch.zeros(size, device=self._device)
        self._places = torch.arange(size[0], device=self._device)
        if old is not None:
            self._values[: old.size(0), : old.size(1), : old.size(2)] = old
