"""The report of each optimized model, one JSON object a line, in a file that several processes may share."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timezone
from typing import Any

from ..handle import handle_of
from .messages import say


def append(path: str, model: Any) -> None:
    """Add a line for a model that has just been optimized. A file that cannot be written is told, and nothing else.

    The line has ``time`` (UTC, ISO 8601), ``pid``, ``program``, ``class``, and what ``model.turbo.report().to_dict()``
    says.
    """
    try:
        line = json.dumps(
            {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "pid": os.getpid(),
                "program": sys.argv[0] if sys.argv else "",
                "class": f"{type(model).__module__}.{type(model).__qualname__}",
                **handle_of(model).report().to_dict(),
            },
            ensure_ascii=False,
            default=str,
        )
        _write(path, f"{line}\n".encode())
    except Exception as error:  # a report is no reason for a program to stop
        say(f"The report cannot be written to {path}: {getattr(error, 'strerror', None) or error}.")


def _write(path: str, data: bytes) -> None:
    """Whole lines, whoever else writes: the file is locked for the time of one, where the system has such locks."""
    with open(path, "ab", buffering=0) as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, and file systems without locks: one write is whole on most
            pass
        end = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):  # a full disk: no half of a line stays for those who read
            file.truncate(end)
            raise OSError(f"no room for {len(data):,} bytes")
