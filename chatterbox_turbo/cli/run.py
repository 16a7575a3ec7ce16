"""``run``, ``enable`` and ``disable``: programs of others, with models optimized as they are loaded."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from . import options
from .screen import PROGRAM

# what is no option of ours belongs to the program, and everything after the first of it
PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def run(
    context: typer.Context,
    program: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- PROGRAM …", help="What follows python: server.py --port 80; -m uvicorn app:app."),
    ] = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End the program where a model cannot be optimized.")
    ] = False,
) -> None:
    """Run a Python program with its Chatterbox models optimized.

    As they are loaded: nothing of the program is changed.
    Without --preset and --config: what CHATTERBOX_TURBO names, else the preset auto.
    """
    from ..config import DEFAULT
    from ..launch import program as started
    from ..launch import site_file
    from ..launch.messages import say
    from ..launch.settings import CONFIG

    if not program:
        raise typer.BadParameter(f"name a program: {PROGRAM} run -- server.py, or {PROGRAM} run -m uvicorn app:app.")
    screen = options.screen_of(context)
    given = config is not None or preset is not None
    if given:
        options.configuration(screen, preset, config)  # a mistake is told before the program starts
    named = str(config.absolute()) if config else preset or os.environ.get(CONFIG) or DEFAULT
    problem = started.unreachable(started.interpreter_options(program), site_file.state() == "enabled")
    if problem and strict:
        raise typer.BadParameter(problem)
    if problem:
        say(f"{problem} The program runs without.")
    started.run(program, started.environment(named, strict))


def enable(
    context: typer.Context,
    system: Annotated[
        bool, typer.Option("--system", help="Also where this Python is no virtual environment, as in a container.")
    ] = False,
) -> None:
    """Have CHATTERBOX_TURBO work for every program.

    Of this environment: a file in its site-packages, which does nothing where the variable is not set.
    """
    from ..launch import site_file

    screen = options.screen_of(context)
    new = site_file.enable(system)
    screen.print(f"{'enabled' if new else 'enabled already'}: {site_file.path()}")
    screen.print(f"Set CHATTERBOX_TURBO to a preset or a configuration file. Taken back by: {PROGRAM} disable")


def disable(context: typer.Context) -> None:
    """Take back what enable has done."""
    from ..launch import site_file

    removed = site_file.disable()
    options.screen_of(context).print(f"{'removed' if removed else 'not enabled'}: {site_file.path()}")
