"""Devices by name."""

from __future__ import annotations

import torch

from ..errors import InvalidRequestError


def device_named(name: str | torch.device) -> str:
    """A device that is there; ``auto`` is the first CUDA device or the CPU.

    Raises:
        InvalidRequestError: it is not there, or is none.
    """
    name = str(name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or (index and not index.isdigit()):
        raise InvalidRequestError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps.")
    if int(index or 0) >= there[kind]:
        raise InvalidRequestError(f"there is no device {name} here (torch {torch.__version__}).")
    return name
