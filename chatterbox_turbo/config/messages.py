"""Validation errors as lines that a user can act on: where it is written, the key, what is wrong, the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import SHORT, brief
from .files import ENV_PREFIX


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name[:SHORT], list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def explain(model: type[BaseModel], error: ValidationError, source: str, overrides: Mapping[str, Any]) -> str:
    """One line for each mistake in values for ``model``: where it is written, the key, what is wrong, the nearest name.

    Args:
        source: where the values come from; ``overrides``: those of them that come from the environment.
    """
    lines: dict[str, str] = {}
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        keys = _keys(model, location)
        origin = _origin(keys, source, overrides)
        where = ".".join(keys)
        if item["type"] == "extra_forbidden":
            *path, key = location
            problem = f"unknown key{nearest(key, _fields(model, path))}"
        elif item["type"] == "value_error":
            problem = item["msg"].removeprefix("Value error, ")
        else:
            problem = f"{item['msg'][0].lower()}{item['msg'][1:]} (got {brief(item['input'])})"
        head = f"{origin}: {where}: " if where else f"{origin}: "
        # a union reports each of its members: join what they accept
        lines[head] = f"{lines[head]}, or {problem}" if head in lines else head + problem
    return "\n".join(lines.values())


def _keys(model: type[BaseModel] | None, location: list[str]) -> list[str]:
    """The part of a pydantic location that a user wrote: no names of union members behind the key."""
    keys: list[str] = []
    for part in location:
        if model is None:
            break
        keys.append(part)
        field = model.model_fields.get(part)
        kind = field.annotation if field else None
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return keys


def _fields(model: Any, path: list[str]) -> Iterable[str]:
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
