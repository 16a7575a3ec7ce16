"""A folder that appears as a whole or not at all, and what processes that were killed have left of theirs.

What is being written lies beside the destination under a hidden name, with a lock on it that ends with its process.
Where there are no such locks (Windows, some network file systems), nothing that was left is taken for such.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import LONG, InvalidRequestError, brief

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def check_destination(destination: Path) -> None:
    """Raise ``InvalidRequestError`` where no folder can be made."""
    if os.path.lexists(destination):
        raise InvalidRequestError(
            f"{brief(str(destination), LONG)} exists already.",
            "Nothing is overwritten.",
            "Name a folder that does not.",
        )
    if not destination.parent.is_dir():
        raise InvalidRequestError(f"There is no folder {brief(str(destination.parent), LONG)}.", "", "Make it first.")


@contextmanager
def new_folder(destination: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A folder beside the destination that becomes it, or that is gone if the body raises.

    ``check`` raises where the destination may not come to be: it may be there by the time that the body is done.

    Raises:
        InvalidRequestError: there can be no folder.
    """
    try:
        folder, lock = _locked_folder(destination)
    except OSError as error:
        raise InvalidRequestError(f"Cannot write to {destination.parent}: {error.strerror or error}.") from error
    try:
        yield folder
        check(destination)
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def remove_unfinished(destination: Path) -> list[Path]:
    """Delete what ``new_folder`` has left of this destination in processes that are no more; what was deleted."""
    name = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{8}}")
    removed = []
    for path in destination.parent.iterdir():
        if not name.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        lock, _ = _lock(path)
        if lock is None:
            continue  # being written, or who knows
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
        if not path.exists():
            removed.append(path)
    return removed


def _locked_folder(destination: Path) -> tuple[Path, int | None]:
    while True:
        folder = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}")
        folder.mkdir()
        lock, taken = _lock(folder)
        if not taken and folder.exists():
            return folder, lock
        if lock is not None:  # somebody has deleted it before it was locked
            os.close(lock)


def _lock(folder: Path) -> tuple[int | None, bool]:
    """A descriptor that holds the folder's lock, and whether another process has it; ``None``: no lock."""
    if fcntl is None:
        return None, False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None, True
    except OSError:
        return None, False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor, False
    except OSError as error:
        os.close(descriptor)
        return None, isinstance(error, BlockingIOError)
