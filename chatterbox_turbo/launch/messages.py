"""What the launcher says, on standard error, each thing once a process."""

from __future__ import annotations

import os
import sys

_said: dict[str, object] = {}  # no lock: a process may be forked while another thread says something


def say(message: str) -> None:
    """One line, where it has not been said yet."""
    line = " ".join(message.split())
    mine = object()
    if sys.stderr is None or _said.setdefault(line, mine) is not mine:
        return
    sys.stderr.write(f"chatterbox-turbo: {line}\n")
    sys.stderr.flush()


def refuse(what: str, strict: bool) -> None:
    """Say why something is not optimized; where that is ``strict``, end the program with exit code 1.

    Another thread than the main one cannot end a program in order: what it raises is its own affair. There the process
    stops at once.
    """
    if not strict:
        say(f"{what} The program runs without.")
        return
    import threading

    say(f"{what} The program ends, as --strict asks for.")
    if threading.current_thread() is threading.main_thread():
        raise SystemExit(1)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(1)
