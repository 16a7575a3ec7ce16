"""How much memory Linux's control groups leave this process: those of containers, systemd units, Slurm jobs.

A process is in a group of each mounted hierarchy, ``/proc/self/cgroup`` says in which, and all groups above that one
bind it as well (cgroups(7)). A mount may show a part of a hierarchy alone, as in a container: ``/proc/self/mountinfo``
says where that begins, and what is above it cannot be read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
UNLIMITED = 2**60  # bytes: version 1 writes 2**63 less a page where there is no limit


@dataclass(frozen=True)
class Group:
    """A group that has a limit, in bytes: the limit, what is in use of it, and what of that goes by itself."""

    limit: int
    used: int
    reclaimable: int

    @property
    def free(self) -> int:
        """Bytes that its processes can still have."""
        return max(0, self.limit - self.used + self.reclaimable)


@dataclass(frozen=True)
class _Version:
    """Names of the files of a group.

    ``limits``: the least counts. Above ``memory.high`` no process ends, but each allocation is put to sleep.
    """

    limits: tuple[str, ...]
    used: str
    reclaimable: str  # an entry of memory.stat, of the group and those below it


_VERSIONS = {
    "cgroup2": _Version(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def groups(root: Path = ROOT) -> Iterator[Group]:
    """Those with a limit that this process is in, from its own one to the highest that can be seen.

    Args:
        root: of the file system.
    """
    for kind, shown, folder in _mounts(root):
        own = _own(root, kind)
        if own is None:
            continue
        path = folder / (own.relative_to(shown) if own.is_relative_to(shown) else "")
        while True:
            group = _read(path, _VERSIONS[kind])
            if group is not None:
                yield group
            if path == folder or _alone(path.parent):
                break
            path = path.parent


@functools.lru_cache(maxsize=8)
def _mounts(root: Path) -> tuple[tuple[str, PurePosixPath, Path], ...]:
    """(file system, the group that is shown at the mount, the mount's folder) of hierarchies that may limit memory."""
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        kind, *_, options = source.split(" ")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            shown, folder = (_unescaped(field) for field in mount.split(" ")[3:5])
            found.append((kind, PurePosixPath(shown), root / folder.lstrip("/")))
    return tuple(found)


def _own(root: Path, kind: str) -> PurePosixPath | None:
    """The group that this process is in. One outside of the namespace (``/..``) is as good as the highest."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" if kind == "cgroup2" else "memory" in controllers.split(","):
            return PurePosixPath("/" if path.startswith("/..") else path)
    return None


def _alone(folder: Path) -> bool:
    """Whether a group of version 1 binds none of those below it, as was the default once."""
    try:
        return (folder / "memory.use_hierarchy").read_text().strip() == "0"
    except OSError:
        return False


def _read(folder: Path, names: _Version) -> Group | None:
    found = (_number(folder / name) for name in names.limits)
    limits = [limit for limit in found if limit is not None and limit < UNLIMITED]
    used = _number(folder / names.used) if limits else None
    if used is None:
        return None
    statistics = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    return Group(min(limits), used, int(statistics.get(names.reclaimable, 0)))


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # no such group, its highest, a controller that is off; "max": no limit
        return int(path.read_text())
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
