"""What a pass makes of upstream's weights, made anew when somebody moves, casts, loads or replaces one of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Modules = Callable[[], Sequence[nn.Module]]


class Fingerprint:
    """The parameters and buffers of modules: which objects they are, where their values lie, in which format.

    It notices ``.to()``, casts, ``load_state_dict`` (in place and by assignment) and tensors that are replaced. It does
    not notice values written through ``.data``; what is read in place has those anyway, what is computed of them not.

    ``addresses``: without them it does not notice that values lie elsewhere now.
    """

    def __init__(self, modules: Sequence[nn.Module], addresses: bool = True):
        self._state = _state if addresses else _content
        # weak references: an address alone may be that of another tensor by now
        self._entries = [(weakref.ref(tensor), self._state(tensor)) for tensor in _tensors(modules)]

    def fits(self, modules: Sequence[nn.Module]) -> bool:
        """Whether all of it is as it was."""
        known = iter(self._entries)
        for tensor in _tensors(modules):
            reference, state = next(known, (None, None))
            if reference is None or reference() is not tensor or self._state(tensor) != state:
                return False
        return next(known, None) is None


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    left = list(modules)
    while left:
        own = vars(left.pop())
        for table in (own["_parameters"], own["_buffers"]):
            yield from (tensor for tensor in table.values() if tensor is not None)
        left += [child for child in own["_modules"].values() if child is not None]


def version(tensor: Tensor) -> int | None:
    """How often values have been written in place; ``None`` for what was made in inference mode: nobody counts there.

    Such a tensor is not always told by ``is_inference``, which asks about the values that it has now.
    """
    try:
        return tensor._version
    except RuntimeError:
        return None


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, version(tensor)


def _content(tensor: Tensor) -> tuple[Any, ...]:
    return _state(tensor)[1:]


class Prepared(Generic[T]):
    """A value made of the weights of some modules, and made again before it is used once they have changed.

    Args:
        modules: the modules as they are now.
        make: the value, and a remark for the report; what it leaves behind is ordinary tensors, whatever mode the
            caller is in.
        release: gives the memory of a value back.

    Attributes:
        generation: goes up with each value; graphs that hold on to addresses of an older one are void.
        addresses: whether a value refers to where the weights are; without, they may move.
        needed: called before a value is used: the weights may be elsewhere.
        away: they are elsewhere and come back; until then a value is not looked at.
    """

    def __init__(self, modules: Modules, make: Callable[[], tuple[T, str]], release: Callable[[T], None]):
        self._modules, self._make, self._release = modules, make, release
        self._value: T | None = None
        self._fingerprint: Fingerprint | None = None
        self._remark, self.generation = "", 0
        self.addresses, self.away = True, False
        self.needed: Callable[[], None] = _nothing

    @property
    def value(self) -> T | None:
        """The value that is there, whether it still fits or not."""
        return self._value

    @property
    def remark(self) -> str:
        """The remark of the value that is there, and whether the next use makes another one."""
        if self._value is None or self.fits():
            return self._remark
        return f"{self._remark} (weights have changed since, and are read again by the next call)"

    def current(self) -> T:
        """The value for the weights as they are now."""
        self.needed()
        if self._value is None or not self.fits():
            self.renew()
        return self._value

    def fits(self) -> bool:
        """Whether the value is that of the weights as they are now."""
        return self._value is not None and (self.away or self._fingerprint.fits(self._modules()))

    def renew(self) -> str:
        """Make the value of the weights as they are now; its remark."""
        self.release()
        with torch.inference_mode(False), torch.no_grad():
            value, self._remark = self._make()
        self.generation += 1
        self._value, self._fingerprint = value, Fingerprint(self._modules(), self.addresses)
        return self._remark

    def release(self) -> None:
        """Give the value's memory back; the next use makes another one."""
        if self._value is not None:
            self._release(self._value)
        self._value = None


def _nothing() -> None:
    pass
