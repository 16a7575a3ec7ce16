"""The digest of a file, by which its content is known again."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK = 2**22  # bytes at a time


def digest(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits, read block by block."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
