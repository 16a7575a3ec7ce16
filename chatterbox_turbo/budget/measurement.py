"""What a model has taken, to be put beside the estimate; and requests that are held to what was planned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import OptimizationConfig
from ..errors import InvalidRequestError
from ..runtime.memory import readings
from ..upstream.families import Parts


def beside(parts: Parts, usage: Mapping[str, Any]) -> int:
    """Bytes in use on the model's device that are not this model's: of the process on a CPU, of PyTorch on a GPU.

    Args:
        usage: ``memory.Usage`` of the same moment, between requests.
    """
    device = parts.device
    every = ((where, sizes) for entry in usage["held"].values() for where, sizes in entry["by"].items())
    held = sum(sum(sizes.values()) for where, sizes in every if torch.device(where).type == device.type)
    own = readings.in_memory(parts.modules().values(), device)
    return max(0, readings.level(device) - own - held)


def taken(usage: Mapping[str, Any], base: int) -> dict[str, int]:
    """Bytes that the model had at most, by phase; ``base``: what was in use beside it."""
    return {phase: max(0, peak - base) for phase, peak in usage["peaks"].items()}


def slots_within(config: OptimizationConfig, slots: int | None) -> int | None:
    """How many utterances of a batch are decoded at once, where a budget was planned for so many.

    Raises:
        InvalidRequestError: more are asked for.
    """
    if config.budget is None:
        return slots
    if slots is not None and slots > config.budget_slots:
        raise InvalidRequestError(
            f"slots is {slots}, but the budget was planned for {config.budget_slots} at once.",
            "Each utterance needs a cache of its own.",
            "Raise budget_slots, or leave slots out.",
        )
    return slots or config.budget_slots
