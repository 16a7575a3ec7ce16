"""Modules built without initial values, and filled from a checkpoint.

A constructor draws random values for every weight, and loading copies the checkpoint over them: time, and the memory of
the weights twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import ModelUnavailableError
from ..device.devices import with_index
from .mapped_files import MappedFiles

_RANDOM = frozenset({
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "kaiming_normal_", "kaiming_uniform_",
    "log_normal_", "multinomial", "normal", "normal_", "rand", "randint", "randn", "random_", "randperm",
    "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_",
})  # fmt: skip
_READERS = 8
_LISTED = 3  # lines and names of an error


class UnfamiliarConstructionError(Exception):
    """A module is built or filled in a way that this file does not know; nothing is wrong with the checkpoint."""


class OwnRandomness(TorchFunctionMode):
    """While it is on, random draws of this thread come from a generator of its own, not from PyTorch's global one."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in _RANDOM and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self._generator}
        return function(*args, **kwargs)


class WithoutInitialValues(OwnRandomness):
    """While it is on, ``torch.empty`` of this thread gives tensors on the meta device, for which nothing is drawn.

    Layers allocate their parameters with ``torch.empty``. What a constructor computes (filters, windows, positions,
    rotary frequencies) is made from other functions and comes out as ever.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and kwargs.get("device") is None:
            return function(*args, **{**kwargs, "device": "meta"})
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init hands on its argument by name
        if getattr(function, "__name__", "") in _RANDOM and isinstance(target, Tensor) and target.is_meta:
            return target
        if getattr(function, "__self__", None) is Tensor.data and len(args) == 2 and args[0].is_meta:
            return None if args[0].shape == args[1].shape else function(*args)  # weight.data = what is computed
        return super().__torch_function__(function, types, args, kwargs)


def construct(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A module whose parameters await their values (on the meta device) and whose buffers have theirs.

    Raises:
        UnfamiliarConstructionError: parameters are shared between layers, which assignment would separate.
    """
    with WithoutInitialValues():
        module = cls(*args, **kwargs)
    if len(list(module.parameters())) != len(list(module.named_parameters(remove_duplicate=False))):
        raise UnfamiliarConstructionError(f"{cls.__name__} shares parameters between layers")
    return module


def fill(
    module: nn.Module, state: Mapping[str, Any], files: MappedFiles, device: torch.device, strict: bool = True
) -> Any:
    """Give a module that ``construct`` made its values: as ``load_state_dict`` would, but each tensor straight to the
    device, in the dtype that the module has for it, with no other copy in between.

    Returns:
        What ``load_state_dict`` returns.

    Raises:
        ModelUnavailableError: keys or shapes do not fit; where ``strict`` is false, a parameter is missing (its value
            would be random).
        UnfamiliarConstructionError: the module keeps a reference to a tensor that never got a value.
    """
    device = with_index(device)  # the threads that place tensors begin with another current device
    before = {(id(owner), name): tensor for owner, name, tensor in _slots(module)}
    result = assign(module, state, files, strict)  # nothing is read until everything is known to fit
    loaded = [
        (owner, name, tensor, old)
        for owner, name, tensor in _slots(module)
        if (old := before[id(owner), name]) is not tensor
    ]
    with ThreadPoolExecutor(min(torch.get_num_threads(), _READERS)) as readers:
        placed = readers.map(lambda slot: files.place(slot[2], device, slot[3].dtype), loaded)
        for (owner, name, tensor, old), own in zip(loaded, placed, strict=True):
            is_parameter = isinstance(tensor, nn.Parameter)
            # through setattr: an LSTM keeps a list of its weights up to date there
            setattr(owner, name, nn.Parameter(own, requires_grad=old.requires_grad) if is_parameter else own)
    empty = [name for name, tensor in _references(module) if tensor.is_meta]
    if empty:
        raise UnfamiliarConstructionError(f"{type(module).__name__}.{empty[0]} is left without a value")
    return result


def assign(module: nn.Module, state: Mapping[str, Any], files: MappedFiles, strict: bool = True) -> Any:
    """Give a module that ``construct`` made the very tensors of a state: views of the files, in the files' formats.

    Returns, raises: as ``fill`` for keys and shapes.
    """
    try:
        result = module.load_state_dict(state, strict=strict, assign=True)
    except RuntimeError as error:
        raise misfit(module, files.path_of(state), str(error).splitlines()[1:]) from error
    lacking = sorted(set(result.missing_keys) & {name for name, _ in module.named_parameters()})
    if lacking:
        raise misfit(module, files.path_of(state), [f"missing: {name}" for name in lacking])
    return result


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            yield from ((owner, name, tensor) for name, tensor in tensors.items() if tensor is not None)


def _references(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes or in a list, tuple or dict that is one."""
    for path, owner in module.named_modules():
        for name, value in {**vars(owner), **owner._parameters, **owner._buffers}.items():
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            for item in (value, *inner):
                if isinstance(item, Tensor):
                    yield f"{path}.{name}".strip("."), item


def misfit(module: nn.Module, path: Any, complaints: list[str]) -> ModelUnavailableError:
    """The error that says what of a file does not fit a module."""
    lines = [line.strip() for line in complaints if line.strip()]
    shown = [line if len(line) <= 200 else f"{line[:200]} …" for line in lines[:_LISTED]]
    more = f" … and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return ModelUnavailableError(
        f"{path or 'The checkpoint'} does not fit {type(module).__name__}.",
        "; ".join(shown) + more,
        "Use the checkpoint of this model and of the installed release of chatterbox-tts.",
    )
