"""Keys and values of several sequences at once, in two tensors that grow by whole buckets."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import forks
from ..cpu.host_memory import reserve

IDLE_SHARE = 16  # of a GPU's memory: what a batch leaves behind at most
BUCKET = 256  # positions; the cache grows, and attention runs, over multiples of it


def bucketed(positions: int) -> int:
    """The least multiple of ``BUCKET`` that holds so many positions."""
    return -(-positions // BUCKET) * BUCKET


class KVCache:
    """Rows 0 to ``rows`` - 1 are in use, each with a length of its own; the rest of the tensors holds anything finite.

    Attributes:
        keys, values: (L, R, H, C, Dh), R and C at least what is in use; empty until the first ``begin``.
        lengths: positions filled by row, on the host.
        device_lengths: the same as (R,) int64 on the device, 0 in rows that are not in use.
    """

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device):
        self._shape = (layers, heads, width)
        self._kind = {"dtype": dtype, "device": device}
        self.lengths: list[int] = []
        self.release()

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self.keys.size(3)

    @property
    def nbytes(self) -> int:
        """Bytes that there is room for, keys and values together."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @torch.inference_mode(False)  # ordinary tensors can be written by a step inside and outside of inference mode
    def release(self) -> None:
        """Give the memory back."""
        layers, heads, width = self._shape
        self.lengths = []
        # zeros: a masked position has weight 0, which must not meet a NaN
        self.keys = torch.zeros((layers, 0, heads, 0, width), **self._kind)
        self.values = torch.zeros_like(self.keys)
        self.device_lengths = torch.zeros(0, dtype=torch.long, device=self._kind["device"])

    def begin(self, rows: int) -> None:
        """Empty the cache and have room for so many rows.

        A larger cache than that is kept on CUDA, where captured graphs hold its addresses, unless a good part of the
        device's memory would lie idle; elsewhere it is given back.
        """
        self.lengths = []
        self.device_lengths.zero_()
        allocated = self.keys.size(1)
        if allocated < rows or (allocated > rows and self._idle(allocated - rows)):
            self._allocate(rows, self.capacity)

    def _idle(self, rows: int) -> bool:
        """Whether so many rows that are not in use are too many."""
        if self.keys.device.type != "cuda":
            return True
        total = torch.cuda.get_device_properties(self.keys.device).total_memory
        return self.nbytes // self.keys.size(1) * rows > total // IDLE_SHARE

    def ensure(self, positions: int) -> None:
        """Have room for so many positions in every row; what is there stays.

        On a CPU room is not memory yet: a position takes its bytes when it is written.
        """
        if positions > self.capacity:
            self._allocate(self.keys.size(1), bucketed(positions))

    def append(self, rows: int, length: int) -> None:
        """Take the next rows into use; the caller writes their first ``length`` positions."""
        first = self.rows
        self.lengths += [length] * rows
        self.device_lengths[first : first + rows] = length

    def count(self, rows: int) -> None:
        """On the device, one position more in those of the first rows that are in use."""
        lengths = self.device_lengths[:rows]
        lengths += lengths > 0

    def advance(self) -> None:
        """The same on the host."""
        self.lengths = [length + 1 for length in self.lengths]

    def drop(self, first: int, rows: int) -> None:
        """Take rows out of use; the last ones take their place."""
        last = self.rows - rows
        if first != last:
            used = max(self.lengths[last:])
            for tensor in (self.keys, self.values):
                tensor[:, first : first + rows, :, :used] = tensor[:, last : last + rows, :, :used]
            self.device_lengths[first : first + rows] = self.device_lengths[last : last + rows]
            self.lengths[first : first + rows] = self.lengths[last:]
        self.device_lengths[last : last + rows] = 0
        del self.lengths[last:]

    def _allocate(self, rows: int, positions: int) -> None:
        try:
            with forks.halted(self.release):
                self._grow(rows, positions)
        except BaseException:  # memory may end between keys and values, which must be of one size
            self.release()
            raise

    @torch.inference_mode(False)
    def _grow(self, rows: int, positions: int) -> None:
        layers, heads, width = self._shape
        used = max(self.lengths, default=0)
        lengths = torch.zeros(rows, dtype=torch.long, device=self._kind["device"])
        lengths[: self.rows] = self.device_lengths[: self.rows]
        for name in ("keys", "values"):  # one after the other: the peak is three quarters of both at once
            old: Tensor = getattr(self, name)
            shape, dtype = (layers, rows, heads, positions, width), self._kind["dtype"]
            host = self._kind["device"].type == "cpu"
            new = reserve(shape, dtype) if host else torch.zeros(shape, **self._kind)
            new[:, : self.rows, :, :used] = old[:, : self.rows, :, :used]
            setattr(self, name, new)
        self.device_lengths = lengths
