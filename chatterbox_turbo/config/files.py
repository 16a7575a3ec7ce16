"""Nested values from and to TOML, YAML and JSON files and environment variables; what they mean is ``model``'s.

An environment variable ``CHATTERBOX_TURBO__SECTION__KEY`` (or ``CHATTERBOX_TURBO__KEY``) overrides a file or
a preset. pydantic-settings would read them too, but passes over unknown names in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import LONG, InvalidConfigError, brief, describe

ENV_PREFIX = "CHATTERBOX_TURBO__"
SUFFIXES = (".toml", ".yaml", ".yml", ".json")


def read(path: Path) -> dict[str, Any]:
    """The values of a file, by suffix; every error names the file."""
    _check_suffix(path, "read")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        name, reason = brief(str(path), LONG), getattr(error, "strerror", None) or describe(error)
        raise InvalidConfigError(f"Cannot read {name}: {reason}.") from None
    try:
        values = _parse(text, path.suffix)
    except ValueError as error:  # tomlkit and json; yaml is translated in _parse
        raise InvalidConfigError(f"Cannot read {path}: not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, Mapping):
        raise InvalidConfigError(f"Cannot read {path}: it holds a {type(values).__name__}, not keys and values.")
    return dict(values)


def write(values: dict[str, Any], path: Path) -> Path:
    """Write values to a file, by suffix."""
    _check_suffix(path, "write")
    if path.suffix == ".toml":
        import tomlkit

        text = tomlkit.dumps(values)
    elif path.suffix == ".json":
        text = json.dumps(values, indent=2) + "\n"
    else:
        text = yaml.safe_dump(values, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def environment(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Overrides from ``CHATTERBOX_TURBO__…`` variables, nested as a file would be."""
    values: dict[str, Any] = {}
    for name, value in (os.environ if variables is None else variables).items():
        if name.startswith(ENV_PREFIX):
            *sections, key = name.removeprefix(ENV_PREFIX).lower().split("__")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    raise InvalidConfigError(f"{name} contradicts another variable that sets all of {section!r}.")
            place[key] = None if value.lower() in ("none", "null") else value
    return values


def _check_suffix(path: Path, verb: str) -> None:
    if path.suffix not in SUFFIXES:
        raise InvalidConfigError(
            f"Cannot {verb} {brief(str(path), LONG)}: unknown suffix {brief(path.suffix)}.",
            "",
            f"Use one of {', '.join(SUFFIXES)}.",
        )


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        import tomlkit

        return tomlkit.parse(text).unwrap()
    if suffix == ".json":
        return json.loads(text)
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
