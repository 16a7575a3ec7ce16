"""Weights of a CUDA device that leave for pinned memory of the host, and come back to the same addresses.

Parts that are never needed at once share one region of the device's memory, one on top of the other. What has been made
of a part (views, CUDA graphs) refers to its place in there, and stays right. Leaving copies nothing: the host keeps a
copy, which is made once and again where somebody has written to a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 2**16  # bytes of a storage; biases and norms stay, which saves thousands of copies
ALIGNMENT = 512  # bytes, as the allocator has them


@dataclass
class _View:
    """A parameter or buffer, and where in its storage it lies."""

    tensor: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    version: int

    def of(self, storage: Tensor) -> Tensor:
        """The same view of other bytes."""
        flat = storage.view(self.tensor.dtype)
        return flat.as_strided(self.size, self.stride, flat.storage_offset() + self.offset)


class _Group:
    """The tensors of one storage."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.nbytes = tensors[0].untyped_storage().nbytes()
        self.views = [_View(t, t.size(), t.stride(), t.storage_offset(), t._version) for t in tensors]
        self.slot: Tensor | None = None  # of the shared region
        self.host: Tensor | None = None
        self._at: list[int] = []  # where the tensors were put

    def away(self) -> bool:
        return self.views[0].tensor.device.type == "cpu"

    def untouched(self) -> bool:
        """Whether all tensors are where they were put: nobody has moved or cast one."""
        return not self._at or [view.tensor.data_ptr() for view in self.views] == self._at

    def keep(self) -> None:
        """Have a copy on the host that is as the weights are now."""
        versions = [view.tensor._version for view in self.views]
        if self.host is not None and versions == [view.version for view in self.views]:
            return
        first = self.views[0].tensor
        flat = first.as_strided((self.nbytes // first.element_size(),), (1,), self._start())
        if self.host is None:
            self.host = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.host.view(first.dtype).copy_(flat)  # waits
        for view, version in zip(self.views, versions, strict=True):
            view.version = version

    def _start(self) -> int:
        view = self.views[0]
        return view.tensor.storage_offset() - view.offset

    def put(self, storage: Tensor) -> None:
        for view in self.views:
            view.tensor.data = view.of(storage)
        self._at = [view.tensor.data_ptr() for view in self.views]


class DevicePart:
    """A part of a model that leaves a CUDA device.

    Args:
        tensors: its parameters and buffers. Tensors of inference mode, and small ones, stay.
        device: where it is at home.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device):
        groups: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.device == device and not tensor.is_inference():
                groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._groups = [_Group(some) for some in groups.values() if some[0].untyped_storage().nbytes() >= SMALLEST]
        self._device = device
        self._early = False
        self._coming: torch.cuda.Event | None = None
        self._sent: list[_Group] = []
        self.tensors = [view.tensor for group in self._groups for view in group.views]
        self.nbytes = sum(group.nbytes for group in self._groups)

    @property
    def span(self) -> int:
        """Bytes of a region that holds all of it."""
        return sum(-(-group.nbytes // ALIGNMENT) * ALIGNMENT for group in self._groups)

    def use(self, region: Tensor | None, early: bool = False) -> None:
        """From its next arrival on, be in a region (uint8, at least ``span`` bytes), or in memory of its own.

        ``early``: the part of the phase before is elsewhere, so that this one may come while that phase computes.
        """
        start, self._early = 0, early
        for group in self._groups:
            group.slot = None if region is None else region[start : start + group.nbytes]
            start += -(-group.nbytes // ALIGNMENT) * ALIGNMENT

    def leave(self) -> int:
        """Be on the host; bytes that went."""
        went = 0
        self._wait()
        for group in self._groups:
            if not group.away() and group.untouched():
                group.keep()
                group.put(group.host)
                went += group.nbytes
        return went

    def arrive(self) -> int:
        """Be on the device for what its current stream does next; bytes that came."""
        came = 0
        sent, self._sent = self._sent, []
        if self._coming is not None:
            torch.cuda.current_stream(self._device).wait_event(self._coming)
            self._coming = None
        for group in self._groups:
            if not group.away() or not group.untouched():
                continue
            written = [view.tensor._version for view in group.views] != [view.version for view in group.views]
            storage = group.slot
            if storage is None:
                storage = torch.empty(group.nbytes, dtype=torch.uint8, device=self._device)
            if group not in sent or written:
                storage.copy_(group.host, non_blocking=True)
            for view in group.views:  # what was written on the host is in the copy there
                view.version = view.tensor._version
            group.put(storage)
            came += group.nbytes
        return came

    def expect(self) -> None:
        """Copy to its region on a side stream, behind what the device does now, if it may come early."""
        waiting = [g for g in self._groups if g.slot is not None and g.away() and g.untouched()]
        if not self._early or self._coming is not None or not waiting:
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still read what was there
        with torch.cuda.stream(stream):
            for group in waiting:
                group.slot.copy_(group.host, non_blocking=True)
        self._coming, self._sent = stream.record_event(), waiting

    def _wait(self) -> None:
        """A copy that is on its way must not meet what comes to the region after it."""
        if self._coming is not None:
            torch.cuda.current_stream(self._device).wait_event(self._coming)
        self._coming, self._sent = None, []

    def restore(self) -> None:
        """Be on the device, in memory of its own."""
        self._wait()
        for group in self._groups:
            if not group.untouched() or group.host is None:
                continue
            storage = torch.empty(group.nbytes, dtype=torch.uint8, device=self._device)
            if group.away():
                storage.copy_(group.host)
            else:
                group.keep()
                storage.copy_(group.host)
            group.put(storage)
        self._groups = []
