"""TensorFloat-32 for the duration of a call. The switches are process-wide: overlapping scopes are counted.

torch 2.9 and later have two APIs for them. ``allow_tf32`` and ``set_float32_matmul_precision`` keep both in agreement;
what ``fp32_precision`` sets makes every reader of those raise ("mix of the legacy and new APIs"), in all threads and
within torch's compiler. So this sets by the older, but where the process has mixed them and its readers raise already.
"""

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


class _Products:
    """Products of matrices: on CUDA; and on the CPU, where ``medium`` and ``high`` may be rounded too."""

    @staticmethod
    def older() -> Any:
        return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32

    @staticmethod
    def newer() -> tuple[Any, ...]:
        return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

    @staticmethod
    def put(older: Any) -> None:
        torch.set_float32_matmul_precision(older[0])

    @staticmethod
    def allow() -> None:
        if torch.get_float32_matmul_precision() == "highest":  # "medium" allows more, and stays
            torch.backends.cuda.matmul.allow_tf32 = True

    @staticmethod
    def forbid() -> None:
        torch.set_float32_matmul_precision("highest")


class _Convolutions:
    """Convolutions, and recurrent layers, which have one older switch with them."""

    @staticmethod
    def older() -> Any:
        return torch.backends.cudnn.allow_tf32

    @staticmethod
    def newer() -> tuple[Any, ...]:
        return torch.backends.cudnn.conv, torch.backends.cudnn.rnn

    @staticmethod
    def put(older: Any) -> None:
        torch.backends.cudnn.allow_tf32 = older

    @staticmethod
    def allow() -> None:
        torch.backends.cudnn.allow_tf32 = True

    @staticmethod
    def forbid() -> None:
        torch.backends.cudnn.allow_tf32 = False


_SWITCHES = (_Products, _Convolutions)


def _newer(switch: Any) -> tuple[Any, ...]:
    """What has ``fp32_precision``, CUDA's first; none before torch 2.9."""
    return switch.newer() if hasattr(torch.backends.cuda.matmul, "fp32_precision") else ()


def _state(switch: Any) -> tuple[Any, list[str]]:
    """What a switch says by the older API, ``None`` where that raises, and by the newer."""
    try:
        older = switch.older()
    except RuntimeError:
        older = None
    return older, [owner.fp32_precision for owner in _newer(switch)]


def _set(allowed: bool) -> list[Any]:
    """Allow TF32, or forbid it everywhere; what the switches said before."""
    before = [_state(switch) for switch in _SWITCHES]
    for switch, (older, _) in zip(_SWITCHES, before, strict=True):
        if older is None:
            for owner in _newer(switch)[: 1 if allowed else None]:
                owner.fp32_precision = "tf32" if allowed else "ieee"
        else:
            (switch.allow if allowed else switch.forbid)()
    return before


def _restore(before: list[Any]) -> None:
    for switch, (older, newer) in zip(_SWITCHES, before, strict=True):
        if older is not None:
            switch.put(older)
        for owner, value in zip(_newer(switch), newer, strict=True):  # the older sets "ieee" for what was "none"
            owner.fp32_precision = value


@contextmanager
def tf32() -> Iterator[None]:
    """Allow TF32 in matrix products and convolutions; the last scope to leave restores what was there."""
    scope = object()
    with forks.undoing(partial(_leave, scope)):
        with _lock:
            first = not _scopes
            if first:
                _saved[:] = [_state(switch) for switch in _SWITCHES]
            _scopes.add(scope)
            if first:
                _set(True)
        yield


def _leave(scope: object) -> None:
    with _lock:
        if scope not in _scopes:
            return
        _scopes.remove(scope)
        if not _scopes:
            _restore(_saved)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 anywhere, convolutions included, for a comparison; ``tf32`` inside of it allows it again."""
    with _lock:
        before = _set(False)
    try:
        yield
    finally:
        with _lock:
            _restore(before)


def allowed() -> tuple[bool, bool]:
    """Whether CUDA's products of matrices, and its convolutions, are in TF32 as things stand, where it can."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    if hasattr(cuda.matmul, "fp32_precision"):  # this never raises
        return cuda.matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    return cuda.matmul.allow_tf32, cudnn.allow_tf32


def numerics() -> tuple:
    """The process-wide settings that decide by which kernels products are computed, as they are now."""
    return (*allowed(), torch.are_deterministic_algorithms_enabled())


def convolves_in_tf32(device: torch.device) -> bool:
    """Whether convolutions are computed in TF32 as things stand, which is PyTorch's default on capable GPUs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and allowed()[1]
