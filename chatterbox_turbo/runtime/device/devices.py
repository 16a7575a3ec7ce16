"""Devices by name, and samples on their way to and from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...errors import InvalidRequestError, brief


def device_named(name: str | torch.device) -> str:
    """A device that is there; ``auto`` is the first CUDA device or the CPU.

    Raises:
        InvalidRequestError: it is not there, or is none.
    """
    name = str(name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or (colon and not (index.isascii() and index.isdigit())):
        raise InvalidRequestError(f"unknown device {brief(name)}: use auto, cpu, cuda, cuda:N or mps.")
    if int(index or 0) >= there[kind]:
        raise InvalidRequestError(f"there is no device {name} here (torch {torch.__version__}).")
    return name


def best_device() -> str:
    """What a machine has for a model: CUDA, else Apple's GPU, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def with_index(device: torch.device) -> torch.device:
    """The same device whatever becomes the current one: ``cuda`` is this thread's current CUDA device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; to CUDA through pinned memory, so that the host does not wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload(samples: np.ndarray, device: torch.device) -> Tensor:
    """A copy of an array as float32 on a device; the host does not wait."""
    return on_device(torch.from_numpy(np.array(samples, dtype=np.float32)), device)


def arriving(tensor: Tensor) -> Callable[[], Tensor]:
    """Start a copy to the host; the call of what is returned waits for it, and for nothing that is queued after it.

    From CUDA it arrives in pinned memory; a host tensor is there already, and no copy.
    """
    if tensor.device.type != "cuda":
        host = tensor.cpu()  # itself where it is there already; MPS has nothing to wait for a part of its queue by
        return lambda: host
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> Tensor:
        arrived.synchronize()
        return pinned

    return wait


def download(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor on the host; from CUDA through pinned memory, with one wait for the stream.

    The copy is in ordinary memory: callers keep results, and pinned pages are scarce.
    """
    array = arriving(tensor)().numpy()
    return array.copy() if tensor.device.type == "cuda" else array
