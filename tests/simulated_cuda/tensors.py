"""Tensors of the simulated machine: a shell that reports a CUDA device around a tensor on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class SimulatedTensor(Tensor):
    """``inner``: the values, on the CPU; ``mode``: what runs operations on them.

    ``index``: of the device; ``None`` where ``data`` was set to a tensor of the host, which it stands for then.
    """

    inner: Tensor
    index: int | None = 0
    mode: Any = None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, index: int) -> SimulatedTensor:
        made = _shell(inner, index)
        made.inner, made.index = inner, index
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if cls.mode is None:
            raise RuntimeError("a tensor of a simulated machine has outlived it")
        return cls.mode.run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.inner!r}, cuda:{self.index})"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.index is None else torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:
        return self.index is not None

    # what torch asks a driver for: the same from the values
    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        return self.inner.is_contiguous(*args, **kwargs)

    def is_pinned(self, *args: Any) -> bool:
        return False

    def pin_memory(self, *args: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    @property
    def data(self) -> SimulatedTensor:
        with torch.no_grad():
            return SimulatedTensor(self.inner.detach(), self.index)

    @data.setter
    def data(self, value: Tensor) -> None:
        simulated = isinstance(value, SimulatedTensor)
        self.inner, self.index = (value.inner, value.index) if simulated else (value, None)
        self.refresh()

    def refresh(self) -> None:
        """Give the shell the shape of its values."""
        Tensor.data.__set__(self, _shell(self.inner, self.index))

    def __deepcopy__(self, memo: Any) -> Any:
        copy = SimulatedTensor(self.inner.clone(), self.index)
        made = torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy
        memo[id(self)] = made
        return made

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert cuda:{self.index} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    # values for the host
    def _read(self, what: str) -> Tensor:
        self.mode.machine.wait(what, self.index)
        return self.inner

    def tolist(self) -> Any:
        return self._read("tolist").tolist()

    def item(self) -> Any:
        return self._read("item").item()

    def __bool__(self) -> bool:
        return bool(self._read("bool"))

    def __int__(self) -> int:
        return int(self._read("int"))

    def __float__(self) -> float:
        return float(self._read("float"))

    def __index__(self) -> int:
        return self._read("index").__index__()

    def __contains__(self, element: Any) -> bool:
        return element in self._read("in")

    # operations that torch does before it dispatches, with a guard that needs a driver
    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    def __invert__(self) -> Any:
        return torch.bitwise_not(self)

    def contiguous(self, memory_format: Any = torch.contiguous_format) -> Any:
        whole = self.inner.is_contiguous(memory_format=memory_format)
        return self if whole else aten.clone.default(self, memory_format=memory_format)

    def nonzero(self, as_tuple: bool = False) -> Any:
        found = aten.nonzero.default(self)
        return found.unbind(1) if as_tuple else found

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        return aten.copy_.default(self, source, non_blocking)

    def new(self, *size: Any) -> Any:
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def __getitem__(self, key: Any) -> Any:
        view, indexes = _views(self, key)
        return view if indexes is None else aten.index.Tensor(view, indexes)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, Tensor) and key.dtype == torch.bool and not isinstance(value, Tensor):
            aten.masked_fill_.Scalar(self, key, value)
            return
        view, indexes = _views(self, key)
        if indexes is not None:
            if not isinstance(value, Tensor):
                value = aten.full.default([], value, dtype=self.dtype, device=self.device)
            aten.index_put_.default(view, indexes, value)
        elif not isinstance(value, Tensor):
            aten.fill_.Scalar(view, value)
        elif value.dim() == 0 and not isinstance(value, SimulatedTensor) and view.dim() > 0:
            aten.fill_.Tensor(view, value)
        else:
            while value.dim() > view.dim() and value.size(0) == 1:
                value = value.squeeze(0)
            aten.copy_.default(view, value)


def _shell(inner: Tensor, index: int) -> Any:
    return Tensor._make_wrapper_subclass(
        SimulatedTensor,
        inner.size(),
        strides=inner.stride(),
        storage_offset=inner.storage_offset(),
        dtype=inner.dtype,
        layout=inner.layout,
        device=torch.device("cuda", index),
        requires_grad=False,
    )


def _views(x: Any, key: Any) -> tuple[Any, list | None]:
    """The part of a key that views can do, done; and index tensors by dimension, or ``None`` where there are none."""
    key = key if isinstance(key, tuple) else (key,)
    if not any(one is Ellipsis for one in key):
        key = (*key, Ellipsis)
    dim, indexes = 0, []
    for position, one in enumerate(key):
        if isinstance(one, list):
            one = torch.tensor(one)
        if one is None:
            x = aten.unsqueeze.default(x, dim)
            indexes.append(None)
            dim += 1
        elif one is Ellipsis:
            rest = [other for other in key[position + 1 :] if other is not None]
            consumed = sum(other.dim() if _is_mask(other) else 1 for other in rest)
            skipped = x.dim() - dim - consumed
            indexes += [None] * skipped
            dim += skipped
        elif isinstance(one, slice):
            if one != slice(None):
                start, stop, step = one.indices(x.size(dim))
                x = aten.slice.Tensor(x, dim, start, max(stop, start), step)
            indexes.append(None)
            dim += 1
        elif not isinstance(one, Tensor) or _is_number(one):
            x = aten.select.int(x, dim, int(one))
        else:
            indexes.append(one)
            dim += one.dim() if _is_mask(one) else 1
    return x, indexes if any(one is not None for one in indexes) else None


def _is_number(one: Tensor) -> bool:
    """Whether the host knows it: a 0-dim tensor there."""
    return one.dim() == 0 and not isinstance(one, SimulatedTensor) and one.dtype != torch.bool


def _is_mask(one: Any) -> bool:
    return isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)
