"""The default random generators of the host and of a device, whatever the device is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import forks

State = tuple[Tensor, Tensor | None]  # of the host, and of the device where it has one of its own


def state(device: torch.device) -> Tensor:
    """Of the generator that a device draws from by default."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def restore(device: torch.device, value: Tensor) -> None:
    """Put a ``state`` back."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(value, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(value)
    else:
        torch.set_rng_state(value)


def states(device: torch.device) -> State:
    """Of the host, and of the device where it has one of its own."""
    return torch.get_rng_state(), None if device.type == "cpu" else state(device)


def restore_all(device: torch.device, value: State) -> None:
    """Put ``states`` back."""
    torch.set_rng_state(value[0])
    if value[1] is not None:
        restore(device, value[1])


def seed(device: torch.device, number: int) -> None:
    """``torch.manual_seed``, of no other device than this one."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Both generators are after the body what they were before."""
    before = states(device)
    with forks.undoing(lambda: restore_all(device, before)):
        yield
