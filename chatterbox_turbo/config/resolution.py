"""Whatever ``apply`` accepts as a configuration, as an ``OptimizationConfig``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidConfigError, brief
from . import presets
from .messages import nearest
from .model import OptimizationConfig

Config = None | str | os.PathLike | Mapping[str, Any] | OptimizationConfig


def resolve(config: Config) -> OptimizationConfig:
    """What ``apply`` accepts, as an ``OptimizationConfig``.

    ``None`` (the preset ``auto``) and a preset's name take environment variables into account, as a file
    does; an ``OptimizationConfig`` or a mapping says what it says.
    """
    if isinstance(config, OptimizationConfig):
        return config
    if isinstance(config, Mapping):
        return OptimizationConfig.from_values(dict(config), "the configuration")
    name = presets.DEFAULT if config is None else config
    if isinstance(name, str) and name in presets.PRESETS:
        return OptimizationConfig.from_values({"preset": name}, f"preset {name}", environment=True)
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        if isinstance(config, os.PathLike) or path.suffix or len(path.parts) > 1:
            return OptimizationConfig.from_file(path)
        raise InvalidConfigError(
            f"Unknown preset {brief(config)}{nearest(config, presets.PRESETS)}.",
            "It is neither a preset nor a file name with a suffix.",
            f"Presets are: {', '.join(presets.PRESETS)}.",
        )
    raise InvalidConfigError(
        f"A configuration cannot be a {type(config).__name__}.",
        "",
        "Pass None, a preset's name, a path, a dict or an OptimizationConfig.",
    )
