"""PyTorch's autocast around some work of this package, and of nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ...errors import describe


@contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """In the body torch's own products and convolutions cast what they are given to ``dtype``.

    Casts of parameters are remembered until the end of the outermost autocast of the thread, and that may be a
    server's, which never ends or in which weights change: here they are forgotten at the end of the body.
    """
    try:
        with torch.autocast(device, dtype):
            yield
    finally:
        torch.clear_autocast_cache()


def inside(around: Callable[[], AbstractContextManager], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, each call of which is inside a context of its own."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return call


def why_no_autocast(device: torch.device, dtype: torch.dtype) -> str:
    """Why torch cannot autocast to a format on a device, or an empty string."""
    name = str(dtype).removeprefix("torch.")
    try:
        # Where it has no such format, torch raises, or warns and goes on without. That warning may be seen: filters are
        # the process's, and to set them here would unsettle those of other threads.
        with torch.autocast(device.type, dtype):
            follows = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == dtype
    except (RuntimeError, UserWarning) as error:  # the latter where a filter makes errors of warnings
        return f"torch has no autocast to {name} on {device.type} ({describe(error)})"
    return "" if follows else f"torch has no autocast to {name} on {device.type}"
