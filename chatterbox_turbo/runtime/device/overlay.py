"""Weights of a CUDA device that leave for pinned memory of the host, and come back to the same addresses.

Parts that are never needed at once share one region of the device's memory, one on top of the other. What has been made
of a part (views, CUDA graphs) refers to its place in there, and stays right. Leaving copies nothing: the host keeps a
copy, which is made once and again where somebody has written to a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

SMALLEST = 2**16  # bytes of a storage; biases and norms stay, which saves thousands of copies
ALIGNMENT = 512  # bytes, as the allocator has them


def _ordinary(move: Callable[P, T]) -> Callable[P, T]:
    """In any mode of the caller: a parameter that is given memory of inference mode is an inference tensor then."""

    @wraps(move)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return move(*args, **kwargs)

    return run


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
        self.shared = False  # whether it lies in that region
        self.gone = False  # whether it was put on the host
        self._at = self._addresses()  # where the tensors were put, or found

    def _addresses(self) -> list[int]:
        return [view.tensor.data_ptr() for view in self.views]

    def untouched(self) -> bool:
        """Whether all tensors are where they were put: nobody has moved or cast one."""
        return self._addresses() == self._at

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
        self._at = self._addresses()
        self.gone, self.shared = storage is self.host, storage is self.slot

    def scatter(self, device: torch.device) -> None:
        """Give tensors that are on the host, or in the shared region, memory of their own on the device.

        What was on the host when somebody gave it other values has those there for that reason alone.
        """
        for view, address in zip(self.views, self._at, strict=True):
            tensor = view.tensor
            if self.gone and tensor.device.type == "cpu":
                tensor.data = tensor.data.to(device)
            elif self.shared and tensor.data_ptr() == address:
                tensor.data = tensor.data.clone()


def _groups(tensors: Iterable[Tensor]) -> list[_Group]:
    """Tensors by storage, but for small ones."""
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    return [_Group(some) for some in found.values() if some[0].untyped_storage().nbytes() >= SMALLEST]


class DevicePart:
    """A part of a model that leaves a CUDA device.

    Args:
        tensors: its parameters and buffers. Tensors of inference mode, and small ones, stay.
        device: where it is at home.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device):
        self._groups = _groups(t for t in tensors if t.device == device and not t.is_inference())
        self._device = device
        self._region: Tensor | None = None
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
        self._region, self._early, start = region, early, 0
        for group in self._groups:
            group.slot = None if region is None else region[start : start + group.nbytes]
            start += -(-group.nbytes // ALIGNMENT) * ALIGNMENT

    @_ordinary
    def leave(self) -> int:
        """Be on the host; bytes that went."""
        went = 0
        self._wait()
        self._look_again()
        for group in self._groups:
            if not group.gone:
                group.keep()
                group.put(group.host)
                went += group.nbytes
        if self._region is not None and any(group.slot is None for group in self._groups):
            # now that none is there, those that are new get their place
            self.use(self._region if self.span <= self._region.nbytes else None, self._early)
        return went

    @_ordinary
    def arrive(self) -> int:
        """Be on the device for what its current stream does next; bytes that came."""
        came = 0
        sent, self._sent = self._sent, []
        if self._coming is not None:
            torch.cuda.current_stream(self._device).wait_event(self._coming)
            self._coming = None
        self._look_again()
        for group in self._groups:
            if not group.gone:
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

    @_ordinary
    def expect(self) -> None:
        """Copy to its region on a side stream, behind what the device does now, if it may come early."""
        waiting = [g for g in self._groups if g.slot is not None and g.gone and g.untouched()]
        if not self._early or self._coming is not None or not waiting:
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still read what was there
        with torch.cuda.stream(stream):
            for group in waiting:
                group.slot.copy_(group.host, non_blocking=True)
        self._coming, self._sent = stream.record_event(), waiting

    def _look_again(self) -> None:
        """Know where tensors lie that somebody has given other values since.

        Those that were moved to another device belong to the part no more.
        """
        touched = [group for group in self._groups if not group.untouched()]
        if not touched:
            return
        for group in touched:
            group.scatter(self._device)
        tensors = [view.tensor for group in touched for view in group.views]
        same = [group for group in self._groups if group not in touched]
        self._groups = same + _groups(tensor for tensor in tensors if tensor.device == self._device)
        self.nbytes = sum(group.nbytes for group in self._groups)

    def _wait(self) -> None:
        """A copy that is on its way must not meet what comes to the region after it."""
        if self._coming is not None:
            torch.cuda.current_stream(self._device).wait_event(self._coming)
        self._coming, self._sent = None, []

    @_ordinary
    def restore(self) -> None:
        """Be on the device, in memory of its own."""
        self._wait()
        self._look_again()
        for group in self._groups:
            if not group.gone and not group.shared:
                continue
            storage = torch.empty(group.nbytes, dtype=torch.uint8, device=self._device)
            if not group.gone:
                group.keep()
            storage.copy_(group.host)
            group.put(storage)
        self._groups = []
