"""The memory of a model as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MIB = 2**20
LEAST = MIB // 20  # bytes of a format that get a row, where a part has several
COLUMNS = ("in memory", "device", "format", "MiB")


def rows(usage: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(name, device, format, MiB) of each part and of what is held beside them, and sums."""
    found = [row for name, entry in usage["parts"].items() for row in _rows(name, entry)]
    found.append(("weights", "", "", _mib(usage["weights"])))
    if usage.get("held"):
        found += [row for name, entry in usage["held"].items() for row in _rows(f"+ {name}", entry)]
        found.append(("beside the weights", "", "", _mib(usage["held_bytes"])))
    if usage.get("graph_pools"):
        found.append(("pools of CUDA graphs (process)", "", "", _mib(usage["graph_pools"]["reserved"])))
    return found


def _rows(name: str, entry: Mapping[str, Any]) -> list[tuple[str, ...]]:
    kinds = [(device, kind, size) for device, formats in entry["by"].items() for kind, size in formats.items()]
    told = [one for one in kinds if one[2] >= LEAST] or sorted(kinds, key=lambda one: -one[2])[:1]
    return [(name, device, kind, _mib(size)) for device, kind, size in told] or [(name, entry["device"], "", "0.0")]


def notes(usage: Mapping[str, Any]) -> list[str]:
    """What there is to say beside the table, a line each."""
    lines = []
    if usage["process"]:
        lines.append(f"process: {', '.join(f'{name} {_mib(size)}' for name, size in usage['process'].items())} MiB")
    if usage.get("peaks"):
        measured = usage["measured"]
        peaks = ", ".join(f"{name} {_mib(size)}" for name, size in usage["peaks"].items())
        least = ", at least" if measured["missed"] else ""
        lines.append(f"peaks by phase ({measured['what']}{least}): {peaks} MiB")
    if usage.get("fragmentation"):
        lines.append(f"allocator: {fragmentation(usage['fragmentation'])}")
    for place, one in usage.get("clearings", {}).items():
        lines.append(
            f"given back {place}: {one['count']} times, {one['seconds']:.3f} s, {_mib(one['bytes'])} MiB"
            + (f"; not {one['skipped']} times: {one['reason']}" if "skipped" in one else "")
        )
    moved = usage.get("transfers", {})
    if moved.get("count"):
        lines.append(f"moved: {moved['count']} times, {_mib(moved['bytes'])} MiB, {moved['seconds']:.3f} s")
    return lines


def fragmentation(found: Mapping[str, float]) -> str:
    """Sizes in MiB, and the share that is held and not in use."""
    sizes = (f"{name.replace('_', ' ')} {_mib(value)}" for name, value in found.items() if name != "fragmentation")
    share = f", {found['fragmentation']:.0%} of it idle" if "fragmentation" in found else ""
    return f"{', '.join(sizes)} MiB{share}"


def text(usage: Mapping[str, Any]) -> str:
    """A table in fixed-width text, and the notes below it."""
    table = [COLUMNS, *rows(usage)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines = [
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=True)),))[: -widths[-1]]
        + row[-1].rjust(widths[-1])
        for row in table
    ]
    return "\n".join([*lines, *notes(usage)])


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"
