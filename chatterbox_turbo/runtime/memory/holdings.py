"""Tensors that objects of this package hold, wherever in them they are."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

OWN = __name__.partition(".")[0]


def storage_of(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of the memory that a tensor, with others maybe, lies in."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def tensors_in(*roots: Any) -> Iterator[Tensor]:
    """Every tensor that can be reached, once: through containers, modules, functions, and objects of this package."""
    seen: dict[int, Any] = {}  # keeps what is looked at, so that no id comes twice
    left = list(roots)
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, Tensor):
            yield one
        else:
            left += _inside(one)


def _inside(one: Any) -> Iterable[Any]:
    if isinstance(one, dict):
        return list(one.values())
    if isinstance(one, list | tuple | set | frozenset):
        return list(one)
    if isinstance(one, nn.Module):
        return [value for table in ("_parameters", "_buffers", "_modules") for value in vars(one)[table].values()]
    if isinstance(one, functools.partial):
        return [one.func, one.args, one.keywords]
    if isinstance(one, types.MethodType):
        return [one.__self__]
    if isinstance(one, types.FunctionType):
        cells = [cell.cell_contents for cell in one.__closure__ or () if _filled(cell)]
        return [*cells, *(one.__defaults__ or ())]
    own = type(one).__module__.partition(".")[0] == OWN or dataclasses.is_dataclass(one)
    if own and not isinstance(one, type):
        slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
        return [*getattr(one, "__dict__", {}).values(), *(getattr(one, name, None) for name in slots)]
    return ()


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def measure(tensors: Iterable[Tensor], without: set[int]) -> dict[str, dict[str, int]]:
    """Bytes by device and format (``{"cpu": {"float32": n}}``) of memory that is not at an address in ``without``.

    Memory that several tensors share counts once, and ``without`` grows by what was counted.
    """
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        address, size = storage_of(tensor)
        if not size or address in without:
            continue
        without.add(address)
        formats = found.setdefault(str(tensor.device), {})
        name = str(tensor.dtype).removeprefix("torch.")
        formats[name] = formats.get(name, 0) + size
    return found
