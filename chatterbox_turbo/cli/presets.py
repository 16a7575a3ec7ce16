"""``presets``: what each preset is for and sets, and which one is meant for this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from . import options
from .screen import table


def presets(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Presets to show every option of.")] = None,
    device: options.Device = "auto",
    json: options.JsonFlag = False,
) -> None:
    """Show what each preset is for and sets, and the one for this machine.

    With names: every option of these, side by side.
    """
    from ..config.presets import DEFAULT, DESCRIPTIONS, PRESETS

    screen = options.screen_of(context)
    configs = {name: _config(name) for name in names or PRESETS}
    with screen.step("looking at this machine"), screen.quiet():
        import torch

        from ..budget.machine import Machine
        from ..runtime.device.devices import best_device

        here = Machine.of(torch.device(best_device() if device == "auto" else options.device_named(device)))
    recommended, reason = here.preset()
    if json:
        listing = {
            name: {
                "description": DESCRIPTIONS.get(name, ""),
                "sets": _sets(name, config),
                "config": config.model_dump(),
            }
            for name, config in configs.items()
        }
        best = {"preset": recommended, "reason": reason, "machine": str(here)}
        screen.write_json({"default": DEFAULT, "recommended": best, "presets": listing}, "-")
        return
    if names:
        screen.print(_options(configs))
        screen.print(
            "auto: used where it can run, otherwise skipped with a reason (see inspect); indented: its options"
        )
        return
    for name, values in PRESETS.items():
        mark = "*" if name == recommended else " "
        default = " Used when no configuration is given." if name == DEFAULT else ""
        screen.print(f"{mark} {name:<10} {DESCRIPTIONS.get(name, '')}{default}")
        screen.print(f"  {'':<10} {_settings(values)}")
    screen.print()
    screen.print(f"* recommended on this machine: {recommended} ({reason}). presets NAME … shows every option.")


def _config(name: str) -> Any:
    from ..config import OptimizationConfig, resolve
    from ..config.presets import PRESETS

    return OptimizationConfig.from_preset(name) if name in PRESETS else resolve(name)  # which names the nearest one


def _sets(name: str, config: Any) -> Mapping[str, Any]:
    """What a preset sets, or a file with its preset."""
    from ..config.presets import PRESETS

    return PRESETS[name] if name in PRESETS else config.model_dump(exclude_unset=True)


def _settings(values: Mapping[str, Any]) -> str:
    """Everything that a preset sets, on one line."""
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.append(f"{key}: {', '.join(f'{name} {_value(one)}' for name, one in value.items())}")
        else:
            found.append(f"{key}: {_value(value)}")
    return "; ".join(found)


def _options(configs: dict[str, Any]) -> Any:
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
