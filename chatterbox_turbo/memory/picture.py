"""Memory over the time of the last requests, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..errors import InvalidRequestError

MIB = 2**20
COLORS = {
    "conditionals": "#8d6a9f",
    "t3": "#2e6f95",
    "flow": "#d1495b",
    "vocoder": "#edae49",
    "watermark": "#6a994e",
    "batch": "#577590",
}
OTHER = "#adb5bd"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
Requests = list[dict[str, Any]]


def draw(usage: Mapping[str, Any], path: Path) -> Path:
    """Write the picture. Time between requests is left out: an app may have waited for hours.

    Raises:
        InvalidRequestError: there is nothing to draw.
    """
    requests: Requests = usage.get("history") or []
    if not requests:
        raise InvalidRequestError(
            "There is no history of the memory yet.", "No request has been made since apply.", "Call generate first."
        )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # no window system needed, and no global backend set
        axes = figure.subplots()
        _phases(axes, requests)
        _line(axes, requests)
        axes.axhline(usage["weights"] / MIB, color="black", linestyle=":", linewidth=1)
        axes.set_ylim(0, 1.12 * max(usage["weights"], *(one["peak"] for one in requests)) / MIB)
        end = sum(one["seconds"] for one in requests)
        axes.set_xlim(0, end)
        axes.annotate(
            f"weights: {usage['weights'] / MIB:.0f} MiB", (end, usage["weights"] / MIB), (-4, 4),
            textcoords="offset points", ha="right",
        )  # fmt: skip
        what = usage["measured"]["what"]
        axes.set(xlabel="time in requests (s), the time between them left out", ylabel=f"{what} (MiB)")
        count = f"{len(requests)} request{'s' * (len(requests) > 1)}"
        axes.set_title(f"Memory over {count}: {what}", loc="left", fontsize=12)
        names = list(dict.fromkeys(phase["name"] for one in requests for phase in one["phases"]))
        handles = [Patch(color=COLORS.get(name, OTHER), label=name) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(names)), frameon=False)
        figure.savefig(path)
    return path


def _phases(axes: Any, requests: Requests) -> None:
    """A bar a phase, from the ground to its peak."""
    at = 0.0
    for one in requests:
        for phase in one["phases"]:
            axes.bar(
                at + phase["start"], phase["peak"] / MIB, width=phase["seconds"], align="edge", alpha=0.75,
                color=COLORS.get(phase["name"], OTHER), linewidth=0,
            )  # fmt: skip
        at += one["seconds"]
        axes.axvline(at, color="#dddddd", linewidth=0.8, zorder=0)


def _line(axes: Any, requests: Requests) -> None:
    """What was in use at each reading."""
    times, levels, at = [], [], 0.0
    for one in requests:
        readings = [(0.0, one["before"])]
        for phase in one["phases"]:
            readings += [(phase["start"], phase["before"]), (phase["start"] + phase["seconds"], phase["after"])]
        readings.append((one["seconds"], one["after"]))
        times += [at + time for time, _ in readings]
        levels += [level / MIB for _, level in readings]
        at += one["seconds"]
    axes.plot(times, levels, color="black", linewidth=1.2, marker=".", markersize=4)
