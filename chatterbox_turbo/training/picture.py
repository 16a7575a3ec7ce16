"""The curves of a run as a PNG: losses of both halves, distances to the recordings, where the time goes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
PARTS = {"data": "#edae49", "generator": "#2e6f95", "discriminators": "#d1495b"}
SHOWN = ("log-mel distance", "STFT distance", "periodicity error", "PESQ")


def draw(path: Path, history: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write the picture, whole or not at all.

    Args:
        history: lines of a run's history, in order.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    steps = [line for line in history if "losses" in line]
    validations = [line for line in history if "validation" in line]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 7), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)  # no window system needed, and no global backend set
        figure.suptitle(title, fontsize=13)
        panels = figure.subplots(2, 3)
        _losses(panels[0, 0], steps)
        _seconds(panels[0, 1], steps)
        places = [panels[0, 2], *panels[1]]
        for axes, name in zip(places, SHOWN, strict=True):
            points = [(line["step"], line["validation"][name]) for line in validations if name in line["validation"]]
            better = "more" if name == "PESQ" else "less"
            axes.set_title(f"{name}, {better} is better", loc="left", fontsize=11)
            axes.set_xlabel("step")
            if points:
                axes.plot(*zip(*points, strict=True), color="#2e6f95", marker="o", markersize=4)
                axes.set_ylim(0, 1.1 * max(value for _, value in points) or 1)
            else:
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color="#7f8c9b")
        for axes in panels.flat:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 35k: a million has seven digits
        new = path.with_name(f".{path.name}")
        figure.savefig(new, format="png")
    os.replace(new, path)


def _losses(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for line in steps for name in line["losses"]))
    for name in names:
        points = [(line["step"], line["losses"][name]) for line in steps if name in line["losses"]]
        total = name.endswith("total")
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.8 if total else 1, alpha=1 if total else 0.7)
    axes.set_yscale("log")
    axes.set_title("losses, weighted", loc="left", fontsize=11)
    axes.set_xlabel("step")
    if names:
        axes.legend(fontsize=7, frameon=False)


def _seconds(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("a step's time (ms)", loc="left", fontsize=11)
    axes.set_xlabel("step")
    if not steps:
        return
    at = [line["step"] for line in steps]
    values = [[1000 * line["seconds"][part] for line in steps] for part in PARTS]
    axes.stackplot(at, np.array(values), labels=list(PARTS), colors=list(PARTS.values()), alpha=0.8, linewidth=0)
    # a step that waited for something else must not flatten all others
    axes.set_ylim(0, 1.5 * float(np.percentile(np.sum(values, axis=0), 98)))
    axes.legend(fontsize=8, frameon=False, loc="upper right")
