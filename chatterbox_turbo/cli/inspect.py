"""``inspect``: the plan for a model class on this machine."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer

from . import options
from .loading import Wanted, load_model
from .options import ModelName


def inspect(
    context: typer.Context,
    model: Annotated[ModelName, typer.Argument(help="Upstream's model; vc is voice conversion.")] = ModelName.english,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    json: options.JsonFlag = False,
) -> None:
    """Show which passes would run here.

    And why others would not.
    The plan is made for a tiny synthetic model of upstream's own class; nothing is applied.
    """
    screen = options.screen_of(context)
    with screen.step("importing torch"), screen.quiet():
        from ..api import inspect as plan_for
    settings = options.configuration(screen, preset, config)
    loaded = load_model(screen, Wanted(model.value, options.device_named(device), synthetic=True))
    if settings.budget is not None:
        screen.note("The budget is left out: it is planned by the sizes of a model, and this one is tiny.")
        settings = settings.model_copy(update={"vram_budget": None, "memory_budget": None, "budget_slots": 1})
    plan = replace(plan_for(loaded.model, settings), fit=None)  # likewise what auto makes of its size
    if json:
        data = {"family": plan.family, "device": plan.device, "preset": settings.preset, "fidelity": settings.fidelity}
        screen.write_json({**data, "passes": [asdict(step) for step in plan.steps]}, "-")
    else:
        screen.print(str(plan))
