"""What a caller has around a call, kept out of it: autocast, the default number format, the default device.

Weights as they are read, tables, buffers, graphs and voices outlive the call that makes them, and serve calls that
other things surround.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")

# functions that make tensors, by what their format is where nobody names one: the default, that of the data, integers
_DEFAULT = (
    "empty", "empty_permuted", "empty_strided", "eye", "linspace", "logspace", "ones", "rand", "randn",
    "scalar_tensor", "zeros", "bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window",
)  # fmt: skip
_OF_DATA = ("arange", "as_tensor", "asarray", "full", "range", "tensor")
_INTEGERS = ("randint", "randperm", "tril_indices", "triu_indices")
_CASTS = ("bfloat16", "double", "half", "type", "where")  # the last takes whole numbers as a condition


@contextmanager
def plain() -> Iterator[None]:
    """In the body nothing is autocast, and tensors of no named format or device are float32 and on the CPU.

    That is how torch begins. Gradient and inference mode, and what decides how kernels compute (threads, deterministic
    algorithms), stay the caller's. Autocast and the default device belong to a thread. The default format is the
    process's, and other threads rely on it (Transformers sets it while it loads a model): it is overridden for this
    thread, not set. Where nothing surrounds the call, this costs microseconds.
    """
    kinds = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    made = torch.empty(0)
    usual = made.dtype == torch.float32 and made.device == CPU
    if usual and not kinds:
        yield
        return
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if not usual:
            stack.enter_context(_Defaults())
        yield


@contextmanager
def lasting(inference: bool = False) -> Iterator[None]:
    """``plain``, for what stays on a model: nothing made in the body is an inference tensor or has an autograd graph.

    An inference tensor cannot be trained or written to outside of inference mode, not even as a parameter's new data.

    Args:
        inference: the model's parameters are inference tensors themselves, and can be computed with no more once one
            of them is given data of another kind; then what is made in the body are such.
    """
    with plain(), torch.inference_mode(inference), torch.no_grad():
        yield


class _Defaults(TorchFunctionMode):
    """Torch's own defaults. Not ``torch.device("cpu")``, which gives way to a default device that is there already."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kind = _makers().get(function)
        if kind is None:
            return _computed(function, args, kwargs)
        if kwargs.get("out") is not None:
            return function(*args, **kwargs)
        given = (*args, *kwargs.values())
        if kwargs.get("device") is None:
            kwargs["device"] = next((one.device for one in given if isinstance(one, Tensor)), CPU)
        if kwargs.get("dtype") is None and kind is _DEFAULT:
            kwargs["dtype"] = torch.float32
        made = function(*args, **kwargs)
        if kwargs.get("dtype") is not None or kind is not _OF_DATA or any(map(_has_format, given)):
            return made
        return function(*args, **kwargs, dtype=torch.float32) if made.dtype.is_floating_point else made


def _computed(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The function's result; where whole numbers alone become fractions, which is in the default format, in float32."""
    made = function(*args, **kwargs)
    default = torch.get_default_dtype()
    if default == torch.float32 or not isinstance(made, Tensor) or made.dtype != default:
        return made
    given = (*args, *kwargs.values())
    tensors = [one for one in given if isinstance(one, Tensor)]
    named = getattr(function, "__name__", "") in _CASTS or any(isinstance(one, (list, tuple)) for one in given)
    if named or not tensors or any(one.is_floating_point() for one in tensors) or _names_format(given):
        return made

    def fractional(one: Any) -> Any:
        return one.float() if isinstance(one, Tensor) else one

    return function(*map(fractional, args), **{name: fractional(one) for name, one in kwargs.items()})


@functools.cache
def _makers() -> dict[Callable[..., Any], tuple[str, ...]]:
    kinds = (_DEFAULT, _OF_DATA, _INTEGERS)
    return {getattr(torch, name): kind for kind in kinds for name in kind if hasattr(torch, name)}


def _has_format(given: Any) -> bool:
    """Whether data brings its number format along, as tensors and arrays do, and lists of them."""
    return any(map(_has_format, given)) if isinstance(given, (list, tuple)) else hasattr(given, "dtype")


def _names_format(given: Any) -> bool:
    return any(isinstance(one, torch.dtype) for one in given)
