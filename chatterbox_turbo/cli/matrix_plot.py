"""The picture of ``bench --matrix``: speed against memory, a point a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plot import STYLE

COLORS = {"upstream": "#7f8c9b", "exact": "#2e6f95", "numerical": "#6a994e", "lossy": "#d1495b"}
MEANING = {
    "upstream": "upstream",
    "exact": "exact: the same samples",
    "numerical": "numerical: the same tokens",
    "lossy": "lossy: figures in the table",
}
LINE = 0.055  # height of a label, of the picture's


@dataclass(frozen=True)
class Point:
    """One configuration: GB while it speaks and at most, upstream's time over its own, and what it promises."""

    name: str
    resident: float
    peak: float
    speed: float
    promise: str


def draw(path: Path, points: Sequence[Point], title: str) -> None:
    """Write a PNG. A point is at the highest memory of a request; a line leads to what is there while it speaks."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # no window system needed, and no global backend set
        axes = figure.subplots()
        axes.set(xlabel="memory (GB), less is better", ylabel="speed, times upstream's")
        right = max((max(point.peak, point.resident) for point in points), default=1.0)
        top = max((point.speed for point in points), default=1.0)
        axes.set(xlim=(0, 1.22 * right), ylim=(0, 1.12 * top))
        axes.axhline(1.0, color="#dddddd", linewidth=1, zorder=0)
        for point, height in zip(points, label_heights(points, 1.12 * top), strict=True):
            color = COLORS.get(point.promise, COLORS["lossy"])
            axes.plot([point.resident, point.peak], [point.speed] * 2, color=color, linewidth=2, alpha=0.5)
            axes.plot([point.resident], [point.speed], marker="|", markersize=10, color=color)
            axes.plot([point.peak], [point.speed], marker="o", markersize=8, color=color)
            axes.annotate(
                point.name, (point.peak, point.speed), (point.peak + 0.02 * right, height), va="center",
                arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip
        kinds = [kind for kind in COLORS if any(point.promise == kind for point in points)]
        handles = [Line2D([], [], marker="o", linestyle="", color=COLORS[k], label=MEANING[k]) for k in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(kinds)), frameon=False)
        axes.set_title(f"{title}\npoint: at most during a request; bar: while tokens are made", loc="left", fontsize=11)
        figure.savefig(path)


def label_heights(points: Sequence[Point], height: float) -> list[float]:
    """Where labels go so that none lies on another: from the slowest up, each at its point or above the last one.

    Labels push each other only where they are near in memory as well.
    """
    widest = max((max(point.peak, point.resident) for point in points), default=1.0)
    placed: list[tuple[float, float]] = []
    found = {}
    for point in sorted(points, key=lambda one: one.speed):
        at = point.speed
        for peak, other in placed:
            if abs(peak - point.peak) < 0.25 * widest:
                at = max(at, other + LINE * height) if abs(at - other) < LINE * height else at
        placed.append((point.peak, at))
        placed.sort(key=lambda one: one[1])
        found[point.name] = at
    return [found[point.name] for point in points]
