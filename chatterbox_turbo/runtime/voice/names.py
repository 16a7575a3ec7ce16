"""Names of voices: what may be one, on every system that a voice's file may be copied to."""

from __future__ import annotations

import unicodedata
from typing import Any

from ...errors import InvalidRequestError, brief

LONGEST = 100  # characters
LONGEST_BYTES = 200  # in UTF-8: files have 255, less an ending and what a temporary file adds
_FORBIDDEN = '<>:"/\\|?*'  # in names of files on Windows; the slashes everywhere
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³")}


def checked(name: Any) -> str:
    """The name in Unicode's composed form (NFC), as which it is kept.

    Raises:
        InvalidRequestError: it cannot be a file's name on every system.
    """
    reason = _why_not(name)
    if reason:
        raise InvalidRequestError(
            f"A voice cannot be named {brief(name)}.",
            f"{reason}.",
            "Its file has the same name: use letters, digits, spaces, '-' and '_'.",
        )
    return composed(name)


def composed(name: str) -> str:
    """The name in Unicode's composed form, whichever a file system or a keyboard has given."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """Equal for names whose files would be the same one where case does not count (Windows, macOS)."""
    return composed(composed(name).casefold())


def is_device(name: str) -> bool:
    """Whether Windows takes a file's name for a device, whatever its ending."""
    return name.partition(".")[0].strip().casefold() in _DEVICES


def _why_not(name: Any) -> str:
    if not isinstance(name, str):
        return "A name is text"
    if not name.strip():
        return "It is empty"
    if len(name) > LONGEST or len(composed(name).encode("utf-8", "replace")) > LONGEST_BYTES:
        return f"It has more than {LONGEST} characters or {LONGEST_BYTES} bytes"
    if not name.isprintable():
        return "It has characters that cannot be printed"
    for character in _FORBIDDEN:
        if character in name:
            return f"It has the character {character!r}"
    if name != name.strip() or name[0] in ".-" or name[-1] == ".":
        return "It begins with '.' or '-', ends with '.', or has a space at an end"
    if is_device(name):
        return "Windows keeps that name for a device"
    return ""
