"""A checkpoint that is named by a folder or by a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ...errors import LONG, ModelUnavailableError, brief, describe

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def folder_of(source: str, files: Sequence[str]) -> Path:
    """The folder itself where there is one, else a snapshot of the repository of this name in the user's cache.

    Args:
        source: a path, or ``owner/name``.
        files: names of those that are downloaded where they are not cached, and of no others.

    Raises:
        ModelUnavailableError: neither a folder nor a repository that is cached or can be had.
    """
    with suppress(RuntimeError, OSError, ValueError):  # nobody's home, too long for a path, a zero byte
        path = Path(source).expanduser()
        if path.exists():
            return path
    if not _REPOSITORY.fullmatch(source):
        raise ModelUnavailableError(
            f"There is no folder {brief(source, LONG)}.", "", "Name a folder, or a repository of the hub (owner/name)."
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:  # the hub's own, and those of every network library below it
        raise ModelUnavailableError(
            f"There is no folder {brief(source, LONG)}, and no repository of that name can be had from the hub "
            f"({describe(error)}).",
            "Its files are neither cached nor downloadable.",
            "Connect to the hub once, or download them and name their folder.",
        ) from error
