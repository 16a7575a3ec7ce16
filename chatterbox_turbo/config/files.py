"""Nested values from and to TOML, YAML and JSON files and environment variables; what they mean is ``model``'s.

An environment variable ``CHATTERBOX_TURBO__SECTION__KEY`` (or ``CHATTERBOX_TURBO__KEY``) overrides a file or
a preset. pydantic-settings would read them too, but passes over unknown names in silence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import LONG, InvalidConfigError, brief, describe

ENV_PREFIX = "CHATTERBOX_TURBO__"
SUFFIXES = (".toml", ".yaml", ".yml", ".json")
NOTHING = ("none", "null")  # words that sections read as None: TOML and the environment have no null
_BOOLEAN = "tag:yaml.org,2002:bool"


def read(path: Path) -> dict[str, Any]:
    """The values of a file, by suffix; every error names the file."""
    _check_suffix(path, "read")
    try:
        text = path.read_text(encoding="utf-8-sig")  # PowerShell writes the mark of the byte order
    except (OSError, ValueError) as error:
        name, reason = brief(str(path), LONG), getattr(error, "strerror", None) or describe(error)
        raise InvalidConfigError(f"Cannot read {name}: {reason}.") from None
    try:
        values = _parse(text, path.suffix)
    except Exception as error:  # parsers raise what they like: AttributeError for a date, RecursionError for brackets
        kind, told = path.suffix[1:].upper(), isinstance(error, ValueError | yaml.YAMLError)
        raise InvalidConfigError(
            f"Cannot read {path}: not valid {kind}: {error if told else describe(error)}"
        ) from None
    if not isinstance(values, Mapping):
        raise InvalidConfigError(f"Cannot read {path}: it holds a {type(values).__name__}, not keys and values.")
    return dict(values)


def write(values: dict[str, Any], path: Path) -> Path:
    """Write values to a file, by suffix."""
    _check_suffix(path, "write")
    if path.suffix == ".toml":
        import tomlkit

        text = tomlkit.dumps(_without_null(values))
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
            place[key] = value
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
    values = yaml.load(text, _Loader)
    return {} if values is None else values


class _Loader(yaml.SafeLoader):
    """YAML whose only booleans are ``true`` and ``false``, as in YAML 1.2: ``off`` is a word that several keys take.

    Where a key is a boolean, ``on``, ``off``, ``yes`` and ``no`` are read as such by its section.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != _BOOLEAN]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for TOML, which has no null: ``"none"``, which sections read as that."""
    return {
        key: _without_null(value) if isinstance(value, Mapping) else NOTHING[0] if value is None else value
        for key, value in values.items()
    }
