"""Starting somebody's program with the launcher in it: the interpreter once more, on what would follow ``python``.

The interpreter takes this process's place (``exec``). What it is given is the program's own command line, and two
environment variables more; so it is Python itself that finds a script, a module, a folder or standard input, sets
``sys.argv``, ``sys.path[0]`` and ``__main__``, prints tracebacks, and ends with the program's exit code or its signal.
Nothing of this package is on the stack. Children that inherit the environment (multiprocessing's spawn, reloaders,
workers) are concerned as well. ``runpy`` in this process would leave frames of ours in each traceback, a ``__main__``
that is gone once the script has ended, and everything that the command has imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import TurboError
from .settings import CONFIG, STRICT

ON_PATH = Path(__file__).parent / "on_path"
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
_PROGRAM = "cm"  # options of Python that name the program; whatever follows is the program's


def interpreter_options(arguments: Sequence[str]) -> list[str]:
    """Those of ``arguments``, as they follow ``python``, that are the interpreter's and not the program's."""
    found: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        option = rest.pop(0)
        letters = "" if option.startswith("--") else option[1:]
        value = next((place for place, letter in enumerate(letters) if letter in "WX" + _PROGRAM), None)
        if value is not None and letters[value] in _PROGRAM:
            if value:  # as in -um
                found.append(f"-{letters[:value]}")
            break
        found.append(option)
        if rest and (option in _WITH_VALUE or value == len(letters) - 1):
            found.append(rest.pop(0))
    return found


def unreachable(options: Sequence[str], enabled: bool) -> str:
    """Why the launcher would not be in a program that Python starts with these options; an empty string if it would."""
    letters = {letter for option in options if not option.startswith("--") for letter in _flags(option)}
    if "S" in letters:
        return "With -S Python runs nothing as it starts."
    if letters & {"E", "I"} and not enabled:
        return "With -E and -I Python reads no PYTHONPATH; `chatterbox-turbo enable` works with these."
    return ""


def _flags(option: str) -> str:
    letters = option[1:] if option.startswith("-") else ""
    return letters[: min((letters.index(letter) for letter in "WX" if letter in letters), default=len(letters))]


def environment(config: str, strict: bool, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a program that is started with a configuration, out of those of this process."""
    found = dict(os.environ if variables is None else variables)
    before = [entry for entry in found.get("PYTHONPATH", "").split(os.pathsep) if entry != str(ON_PATH)]
    found["PYTHONPATH"] = os.pathsep.join([str(ON_PATH), *before]) if any(before) else str(ON_PATH)
    found[CONFIG] = config
    if strict:
        found[STRICT] = "1"
    return found


def run(arguments: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Become ``python arguments``, with the options that this interpreter itself was started with.

    Raises:
        TurboError: the interpreter cannot be started.
        SystemExit: on Windows, where nothing can take the place of a process: the program has ended.
    """
    command = [sys.executable, *interpreter_options(sys.orig_argv[1:]), *arguments]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        if os.name == "nt":
            beside(command, variables)
        os.execve(sys.executable, command, dict(variables))
    except OSError as error:
        raise TurboError(f"Cannot start {sys.executable}: {error.strerror or error}.") from None


def beside(command: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Run a command as a child, and end as it has ended; Ctrl-C reaches both, and is the child's to answer."""
    with subprocess.Popen(command, env=dict(variables)) as child:
        while True:
            try:
                raise SystemExit(child.wait())
            except KeyboardInterrupt:
                continue
