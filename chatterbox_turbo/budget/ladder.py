"""What may be tried to make a model fit: settings in order, the fastest of each fidelity first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..config import PRECISION_PARTS, OptimizationConfig, merge
from ..errors import InvalidConfigError

Values = dict[str, dict[str, Any]]
AS_CONFIGURED = "as configured"

IDLE: Values = {"offload": {"mode": "idle"}}
SEQUENTIAL: Values = {"offload": {"mode": "sequential"}}
HALF: Values = {"precision": dict.fromkeys(PRECISION_PARTS, "auto")}
INT8: Values = {**HALF, "quantization": {"t3": "int8"}}
FOUR: Values = {**HALF, "quantization": {"t3": "auto"}}

# In this order: what is lossless first, then what is fast, at last what waits in each phase.
LADDER: tuple[tuple[str, Values], ...] = (
    (AS_CONFIGURED, {}),
    ("voice encoders away while idle", IDLE),
    ("half precision", HALF),
    ("half precision, voice encoders away", {**HALF, **IDLE}),
    ("T3 in int8, the rest in half precision", INT8),
    ("T3 in int8, the rest in half precision, voice encoders away", {**INT8, **IDLE}),
    ("T3 in four bits, the rest in half precision", FOUR),
    ("T3 in four bits, the rest in half precision, voice encoders away", {**FOUR, **IDLE}),
    ("each part in its phase only", SEQUENTIAL),
    ("half precision, each part in its phase only", {**HALF, **SEQUENTIAL}),
    ("T3 in int8, the rest in half precision, each part in its phase only", {**INT8, **SEQUENTIAL}),
    ("T3 in four bits, the rest in half precision, each part in its phase only", {**FOUR, **SEQUENTIAL}),
)
KEPT = ("originals", "voice_bytes")  # let go of where that is left to the ladder
LOSSLESS = LADDER[:2]  # what the preset auto may choose by itself


@dataclass(frozen=True)
class Rung:
    """A name, and the configuration with what it sets; or why that cannot be had."""

    name: str
    config: OptimizationConfig | None
    obstacle: str = ""


def rungs(config: OptimizationConfig, on_host: bool, ladder: tuple[tuple[str, Values], ...] = LADDER) -> Iterator[Rung]:
    """The ladder for a configuration: what it says of itself, or by its preset, stays.

    Args:
        on_host: the model is on a CPU, where what is kept for revert and for the next request lies in the same memory:
            it is let go of.
    """
    given = config.model_dump(exclude_unset=True)
    for name, values in ladder:
        if on_host:
            changed = [part for part in ("precision", "quantization") if part in values]
            values = merge(values, {part: {"originals": "discard"} for part in changed})
            values = merge(values, {"decoding": {"voice_bytes": 0}}) if values else values
        free = {
            section: {key: value for key, value in options.items() if key not in given.get(section, {})}
            for section, options in values.items()
        }
        fixed = [
            f"{section}.{key} is {given[section][key]}"
            for section, options in values.items()
            for key, value in options.items()
            if key in given.get(section, {}) and given[section][key] != value and key not in KEPT
        ]
        if fixed:
            yield Rung(name, None, " and ".join(fixed))
            continue
        try:
            yield Rung(name, OptimizationConfig(**merge(given, free)) if values else config)
        except InvalidConfigError as error:
            yield Rung(name, None, error.what.partition(": ")[2] or error.what)
