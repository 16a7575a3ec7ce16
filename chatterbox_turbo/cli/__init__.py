"""The command ``chatterbox-turbo``: one file a sub-command.

Exit codes: 0 done; 1 something is wrong (an error, a broken promise, a finding of ``doctor``); 2 misuse.
Modules of this folder import torch and upstream inside functions, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``arguments`` are those of the process where left out."""
    import typer

    from ..errors import InvalidConfigError, TurboError
    from .app import app
    from .screen import PROGRAM, Screen

    screen = Screen(arguments=list(sys.argv[1:] if arguments is None else arguments))
    command = typer.main.get_command(app)
    try:
        return command.main(screen.arguments, prog_name=PROGRAM, standalone_mode=False, obj=screen) or 0
    except (KeyboardInterrupt, typer.Abort):
        screen.error("interrupted.")
        return 130
    except Exception as error:
        if screen.debug:
            traceback.print_exc()
        if hasattr(error, "format_message"):  # click's own, of whichever click typer brings
            usage = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
            screen.error(f"{error.format_message()} Try '{usage} --help'.")
            return getattr(error, "exit_code", 2)
        if isinstance(error, TurboError):
            screen.error(str(error))
            return 2 if isinstance(error, InvalidConfigError) else 1
        hint = "" if screen.debug else f" Run {PROGRAM} --debug … for the traceback."
        if isinstance(error, OSError):
            screen.error(f"{error}.{hint}")
        else:
            screen.error(f"{type(error).__name__}: {error}.{hint}")
        return 1
