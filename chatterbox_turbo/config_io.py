"""Configurations from and to files, environment variables and preset names; readable error messages.

An environment variable ``CHATTERBOX_TURBO__SECTION__KEY`` (or ``CHATTERBOX_TURBO__KEY``) overrides a file or
a preset. pydantic-settings would read them too, but passes over unknown names in silence.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from . import presets
from .config import SOURCE, OptimizationConfig, merge
from .errors import InvalidConfigError

ENV_PREFIX = "CHATTERBOX_TURBO__"
SUFFIXES = (".toml", ".yaml", ".yml", ".json")

Config = None | str | os.PathLike | Mapping[str, Any] | OptimizationConfig


def resolve(config: Config) -> OptimizationConfig:
    """What ``apply`` accepts, as an ``OptimizationConfig``.

    ``None`` (the preset ``auto``) and a preset's name take environment variables into account, as a file
    does; an ``OptimizationConfig`` or a mapping says what it says.
    """
    if isinstance(config, OptimizationConfig):
        return config
    if isinstance(config, Mapping):
        return _validate(dict(config), "the configuration")
    if config is None:
        return _with_environment({"preset": presets.DEFAULT}, f"preset {presets.DEFAULT}")
    if isinstance(config, str) and config in presets.PRESETS:
        return _with_environment({"preset": config}, f"preset {config}")
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        if isinstance(config, os.PathLike) or path.suffix or len(path.parts) > 1:
            return read(path)
        raise InvalidConfigError(
            f"Unknown preset {config!r}{nearest(config, presets.PRESETS)}.",
            "It is neither a preset nor a file name with a suffix.",
            f"Presets are: {', '.join(presets.PRESETS)}.",
        )
    raise InvalidConfigError(
        f"A configuration cannot be a {type(config).__name__}.",
        "",
        "Pass None, a preset's name, a path, a dict or an OptimizationConfig.",
    )


def read(path: Path) -> OptimizationConfig:
    """Read a file; every error names the file and the key."""
    if path.suffix not in SUFFIXES:
        raise InvalidConfigError(
            f"Cannot read {path}: unknown suffix {path.suffix!r}.", "", f"Use one of {', '.join(SUFFIXES)}."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"Cannot read {path}: {error}.") from None
    try:
        values = _parse(text, path.suffix)
    except ValueError as error:  # tomlkit and json; yaml is translated in _parse
        raise InvalidConfigError(f"Cannot read {path}: not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, Mapping):
        raise InvalidConfigError(f"Cannot read {path}: it holds a {type(values).__name__}, not keys and values.")
    return _with_environment(dict(values), str(path))


def write(config: OptimizationConfig, path: Path) -> Path:
    """Write every key, so that the file keeps its meaning when a preset changes."""
    if path.suffix not in SUFFIXES:
        raise InvalidConfigError(
            f"Cannot write {path}: unknown suffix {path.suffix!r}.", "", f"Use one of {', '.join(SUFFIXES)}."
        )
    if callable(config.decoding.progress):
        raise InvalidConfigError(
            f"Cannot write {path}: decoding.progress is a function.", "", "Set it to 'bar' or 'off' first."
        )
    values = config.model_dump(exclude_none=True)
    if path.suffix == ".toml":
        import tomlkit

        text = tomlkit.dumps(values)
    elif path.suffix == ".json":
        text = json.dumps(values, indent=2) + "\n"
    else:
        text = yaml.safe_dump(values, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


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


def _with_environment(values: dict[str, Any], source: str) -> OptimizationConfig:
    overrides = environment()
    return _validate(merge(values, overrides), source, overrides) if overrides else _validate(values, source)


def _validate(values: dict[str, Any], source: str, overrides: Mapping[str, Any] | None = None) -> OptimizationConfig:
    token = SOURCE.set((source, overrides or {}))
    try:
        return OptimizationConfig(**{str(key): value for key, value in values.items()})
    finally:
        SOURCE.reset(token)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def explain(error: ValidationError, source: str, overrides: Mapping[str, Any]) -> str:
    """One line for each mistake: where it is written, the key, what is wrong, the nearest right name."""
    lines: dict[str, str] = {}
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        keys = _keys(location)
        origin = _origin(keys, source, overrides)
        where = ".".join(keys)
        if item["type"] == "extra_forbidden":
            *path, key = location
            problem = f"unknown key{nearest(key, _fields(path))}"
        elif item["type"] == "value_error":
            problem = item["msg"].removeprefix("Value error, ")
        else:
            problem = f"{item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"
        head = f"{origin}: {where}: " if where else f"{origin}: "
        # a union reports each of its members: join what they accept
        lines[head] = f"{lines[head]}, or {problem}" if head in lines else head + problem
    return "\n".join(lines.values())


def _keys(location: list[str]) -> list[str]:
    """The part of a pydantic location that a user wrote: no names of union members behind the key."""
    keys: list[str] = []
    model: type[BaseModel] | None = OptimizationConfig
    for part in location:
        if model is None:
            break
        keys.append(part)
        field = model.model_fields.get(part)
        kind = field.annotation if field else None
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return keys


def _fields(path: list[str]) -> Iterable[str]:
    model: Any = OptimizationConfig
    for part in path:
        model = model.model_fields[part].annotation
    return model.model_fields


def _origin(keys: list[str], source: str, overrides: Mapping[str, Any]) -> str:
    place: Any = overrides
    for key in keys:
        if not isinstance(place, Mapping) or key not in place:
            return source
        place = place[key]
    return ENV_PREFIX + "__".join(keys).upper() if keys else source
