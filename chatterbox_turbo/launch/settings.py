"""What the environment asks for."""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Mapping

CONFIG, STRICT, REPORT = "CHATTERBOX_TURBO", "CHATTERBOX_TURBO_STRICT", "CHATTERBOX_TURBO_REPORT"


class Settings(namedtuple("Settings", ("config", "strict", "report"), defaults=(False, None))):
    """Settings of the launcher in one process.

    Attributes:
        config: a preset's name, or the absolute path of a file.
        strict: a model that cannot be optimized ends the program.
        report: absolute path of the file that gets a line for each optimized model.
    """

    __slots__ = ()


def from_environment(variables: Mapping[str, str] | None = None) -> Settings | None:
    """The settings in ``variables`` (those of the process), or ``None`` where ``CHATTERBOX_TURBO`` is not set.

    Paths count from the folder that is the current one now, wherever the program goes later.
    """
    variables = os.environ if variables is None else variables
    config = variables.get(CONFIG, "").strip()
    if not config:
        return None
    if os.path.splitext(config)[1] or os.path.dirname(config):  # as the configuration tells a file from a preset
        config = os.path.abspath(config)
    report = variables.get(REPORT, "").strip()
    strict = variables.get(STRICT, "").strip().lower() not in ("", "0", "false", "no")
    return Settings(config, strict, os.path.abspath(report) if report else None)
