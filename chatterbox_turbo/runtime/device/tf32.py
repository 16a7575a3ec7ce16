"""TensorFloat-32 for the duration of a call. The switch is process-wide: overlapping scopes are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .. import forks

_lock = forks.lock()
_scopes: set[object] = set()  # that have not ended
_saved: list[Any] = []


def _switches() -> list[tuple[Any, str, Any]]:
    """(object, attribute, value that allows TF32) of this torch release."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cuda, "fp32_precision"):  # torch 2.9 and later; mixing with allow_tf32 raises there
        return [(cuda, "fp32_precision", "tf32"), (cudnn.conv, "fp32_precision", "tf32")]
    return [(cuda, "allow_tf32", True), (cudnn, "allow_tf32", True)]


@contextmanager
def tf32() -> Iterator[None]:
    """Allow TF32 in matrix products and convolutions; the last scope to leave restores what was there."""
    scope = object()
    with forks.undoing(partial(_leave, scope)):
        with _lock:
            first = not _scopes
            if first:
                _saved[:] = [getattr(owner, name) for owner, name, _ in _switches()]
            _scopes.add(scope)
            for owner, name, value in _switches() if first else ():
                setattr(owner, name, value)
        yield


def _leave(scope: object) -> None:
    with _lock:
        if scope not in _scopes:
            return
        _scopes.remove(scope)
        if not _scopes:
            for (owner, name, _), value in zip(_switches(), _saved, strict=True):
                setattr(owner, name, value)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 anywhere, convolutions included, for a comparison; ``tf32`` inside of it allows it again."""
    with _lock:
        saved = [getattr(owner, name) for owner, name, _ in _switches()]
        for owner, name, allowed in _switches():
            setattr(owner, name, False if allowed is True else "ieee")
    try:
        yield
    finally:
        with _lock:
            for (owner, name, _), value in zip(_switches(), saved, strict=True):
                setattr(owner, name, value)


def numerics() -> tuple:
    """The process-wide settings that decide by which kernels products are computed, as they are now."""
    return (*(getattr(owner, name) for owner, name, _ in _switches()), torch.are_deterministic_algorithms_enabled())


def convolves_in_tf32(device: torch.device) -> bool:
    """Whether convolutions are computed in TF32 as things stand, which is PyTorch's default on capable GPUs."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    owner, name, allowed = _switches()[1]
    return getattr(owner, name) in (allowed, "none") if isinstance(allowed, str) else getattr(owner, name) is True
