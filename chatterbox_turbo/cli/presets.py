"""``presets``: what each preset turns on."""

from __future__ import annotations

from typing import Any

import typer

from . import options
from .screen import table


def presets(context: typer.Context, json: options.JsonFlag = False) -> None:
    """Show what each preset turns on."""
    from ..config import OptimizationConfig
    from ..config.presets import DEFAULT, DESCRIPTIONS, PRESETS

    screen = options.screen_of(context)
    configs = {name: OptimizationConfig.from_preset(name) for name in PRESETS}
    if json:
        listing = {
            name: {"description": DESCRIPTIONS.get(name, ""), "config": config.model_dump()}
            for name, config in configs.items()
        }
        screen.write_json({"default": DEFAULT, "presets": listing}, "-")
        return
    for name in PRESETS:
        mark = " (default)" if name == DEFAULT else ""
        screen.print(f"{name}{mark}: {DESCRIPTIONS.get(name, '')}")
    screen.print()
    screen.print(_table(configs))
    screen.print("auto: used where it can run, otherwise skipped with a reason (see inspect); indented: its options")


def _table(configs: dict[str, Any]) -> Any:
    rows = table("", "pass", *configs)
    rows.add_row("fidelity at most", *(config.fidelity for config in configs.values()))
    sections = [dict(config.sections()) for config in configs.values()]
    for name, first in sections[0].items():
        rows.add_row(name, *(_state(section[name], c) for section, c in zip(sections, configs.values(), strict=True)))
        for key in type(first).model_fields:
            if key != "enabled":
                rows.add_row(f"  {key}", *(_value(getattr(section[name], key)) for section in sections))
    return rows


def _state(section: Any, config: Any) -> str:
    from ..config import exceeds

    if section.enabled is False or section.idle:
        return "off"
    if exceeds(section.promise, config.fidelity):
        return f"off ({section.promise})"
    return "on" if section.enabled is True else "auto"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
