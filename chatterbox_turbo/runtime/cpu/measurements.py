"""What has been measured of this machine, kept on disk: whoever computes here afterwards does it in the same way."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

CACHE_VARIABLE = "CHATTERBOX_TURBO_CACHE"


def cache_folder() -> Path:
    """Where measurements are kept: ``$CHATTERBOX_TURBO_CACHE``, or the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("chatterbox_turbo", appauthor=False))


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def read(path: Path) -> dict:
    """What a file has; nothing where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, content: dict) -> None:
    """Keep it, where the folder can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(content, indent=1))
        scratch.replace(path)  # whole or not at all, whoever else writes
    except OSError:
        pass  # a read-only home: measured anew in every process
