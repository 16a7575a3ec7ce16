"""The sub-commands and the global options."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import (
    batch,
    bench,
    demo,
    doctor,
    inspect,
    prepare,
    presets,
    quantize,
    read,
    run,
    say,
    serve,
    verify,
    vocoder,
    voices,
)
from .screen import PROGRAM

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, and everything that upstream prints.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make chatterbox-tts faster and smaller: try it, use it, measure it, check it."""
    context.obj.debug = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


COMMANDS = (
    demo.demo,
    say.say,
    read.read,
    batch.batch,
    serve.serve,
    bench.bench,
    verify.verify,
    inspect.inspect,
    presets.presets,
    prepare.prepare,
    quantize.quantize,
    doctor.doctor,
    run.enable,
    run.disable,
)
for function in COMMANDS:
    app.command(function.__name__)(function)
app.command("run", context_settings=run.PASSED_ON)(run.run)
app.add_typer(voices.app, name="voices")
app.add_typer(vocoder.app, name="vocoder")
