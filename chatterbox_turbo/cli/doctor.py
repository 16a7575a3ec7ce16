"""``doctor``: whether this machine and installation are fit, and what to do where they are not."""

from __future__ import annotations

from dataclasses import asdict

import typer

from . import options
from .checks import all_checks

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(context: typer.Context, json: options.JsonFlag = False) -> None:
    """Check this installation and machine.

    Python, torch, devices, chatterbox-tts and its patch points. Exit code 1 if something cannot work.
    """
    from rich.text import Text

    screen = options.screen_of(context)
    with screen.step("looking around"), screen.quiet():
        found = list(all_checks(screen.announce))
    errors = [check for check in found if check.status == "error"]
    if json:
        screen.write_json({"errors": len(errors), "checks": [asdict(check) for check in found]}, "-")
    else:
        for check in found:
            line = Text.assemble((f"{check.status:<8}", STYLES[check.status]), f"{check.name:<19} {check.detail}")
            if check.remedy:
                line.append(f"\n{'':<27} -> {check.remedy}")
            screen.print(line)
    if errors:
        raise typer.Exit(1)
