"""The picture of ``demo``: both waveforms, and how long each phase took."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {"upstream": "#7f8c9b", "optimized": "#d1495b"}
BINS = 2000  # columns of a waveform: more than the picture has pixels


def draw(
    path: Path, waves: dict[str, np.ndarray], rate: int, seconds: dict[str, tuple[float, float]], title: str
) -> None:
    """Write a PNG.

    Args:
        waves: samples (n,) at ``rate`` Hz by side, upstream first.
        seconds: upstream's and optimized's by phase, in the order of the bars.
    """
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # no window system needed, and no global backend set
        figure.suptitle(title)
        rows = figure.subplots(len(waves) + 1, 1, height_ratios=[1] * len(waves) + [1.8])
        longest = max(len(wave) for wave in waves.values()) / rate
        loudest = max(1e-3, *(float(np.abs(wave).max()) for wave in waves.values()))
        for axes, (side, wave) in zip(rows, waves.items(), strict=False):
            times, low, high = _envelope(wave, rate)
            axes.fill_between(times, low, high, color=COLORS[side], linewidth=0.4)
            axes.set(xlim=(0, longest), ylim=(-1.1 * loudest, 1.1 * loudest), ylabel=side)
        rows[len(waves) - 1].set_xlabel("seconds of speech")
        _bars(rows[-1], seconds)
        figure.savefig(path)


def _envelope(wave: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least and greatest sample of each column: a line through every sample would hide the shape."""
    edges = np.unique(np.linspace(0, len(wave) - 1, BINS).astype(int))
    return edges / rate, np.minimum.reduceat(wave, edges), np.maximum.reduceat(wave, edges)


def _bars(axes, seconds: dict[str, tuple[float, float]]) -> None:
    places = np.arange(len(seconds))
    for offset, side in ((-0.2, "upstream"), (0.2, "optimized")):
        values = [pair[side == "optimized"] for pair in seconds.values()]
        bars = axes.barh(places + offset, values, height=0.38, color=COLORS[side], label=side)
        axes.bar_label(bars, [f" {value:.2f} s" for value in values], padding=2)
    axes.set(yticks=places, xlabel="seconds of computation")
    axes.set_yticklabels(
        [f"{name}  ({a / b:.2f}x)" if b >= 0.01 else name for name, (a, b) in seconds.items()]  # no ratio of noise
    )
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)  # above the longest bar
