"""The file that has the launcher in every process of an environment, where ``CHATTERBOX_TURBO`` is set.

Python executes lines of ``.pth`` files in site-packages that begin with ``import``. This one looks for the variable,
and does nothing where it is not set. It says so, instead of failing, where the package has been uninstalled since.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ..errors import TurboError

NAME = "chatterbox_turbo.pth"
_MARK = "# Written by `chatterbox-turbo enable`; `chatterbox-turbo disable` removes it.\n"
_CODE = (
    "import sys\\n"
    "try:\\n from chatterbox_turbo.launch.startup import start\\n"
    "except ImportError as e:\\n"
    " hasattr(sys, '_no_chatterbox_turbo') or sys.stderr and sys.stderr.write("
    "f'chatterbox-turbo: {sys.executable} cannot import it, and runs without: {e}\\\\n')\\n"
    " sys._no_chatterbox_turbo = True\\n"  # in a virtual environment Python reads such files twice
    "else:\\n start()"
)
CONTENT = f'{_MARK}import os; os.environ.get("CHATTERBOX_TURBO") and exec("{_CODE}")\n'


def path() -> Path:
    """Where the file is, or would be: in site-packages of this interpreter."""
    return Path(sysconfig.get_path("purelib")) / NAME


def state() -> Literal["enabled", "disabled", "outdated"]:
    """Whether the file is there; ``outdated`` where it is not what this version writes."""
    try:
        found = path().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "outdated" if path().exists() else "disabled"
    return "enabled" if found == CONTENT else "outdated"


def is_environment() -> bool:
    """Whether this Python is an environment of its own: a virtual one, or conda's."""
    return sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir()


def is_managed() -> bool:
    """Whether the system's package manager asks others to keep out (PEP 668)."""
    return (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()


def enable(system: bool = False) -> bool:
    """Put the file there; whether it was not there as it is.

    Args:
        system: also where this Python is no environment of its own.

    Raises:
        TurboError: it is none; site-packages cannot be written; Python does not read ``.pth`` files there.
    """
    if not is_environment() and not system:
        kind = "belongs to the system" if is_managed() else "is no virtual environment"
        raise TurboError(
            f"{sys.executable} {kind}.",
            "Every program that runs on it would look for CHATTERBOX_TURBO as it starts.",
            "Use a virtual environment that chatterbox-tts is installed in; or pass --system where all of this Python "
            "is meant, as in a container.",
        )
    file = path()
    if not any(os.path.realpath(folder) == os.path.realpath(file.parent) for folder in site.getsitepackages()):
        raise TurboError(
            f"Python does not read .pth files in {file.parent}.",
            f"It reads those in {', '.join(site.getsitepackages())}.",
            "Start programs with `chatterbox-turbo run`.",
        )
    if state() == "enabled":
        return False
    _check_own(file)
    temporary = file.with_name(f".{NAME}.{os.getpid()}")  # Python may start while it is written
    try:
        temporary.write_text(CONTENT, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _unwritable(file, error) from None
    return True


def disable() -> bool:
    """Remove the file; whether it was there.

    Raises:
        TurboError: site-packages cannot be written, or the file is not this package's.
    """
    file = path()
    if state() == "disabled":
        return False
    _check_own(file)
    try:
        file.unlink()
    except OSError as error:
        raise _unwritable(file, error) from None
    return True


def _check_own(file: Path) -> None:
    try:
        own = not file.exists() or file.read_text(encoding="utf-8").startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        own = False
    if not own:
        raise TurboError(f"{file} is not a file that `chatterbox-turbo enable` wrote.", "", "Look at it, and move it.")


def _unwritable(file: Path, error: OSError) -> TurboError:
    return TurboError(
        f"Cannot write to {file.parent}: {error.strerror or error}.",
        "",
        "Run it as who owns the environment; or start programs with `chatterbox-turbo run`, which writes nothing.",
    )
