"""The picture of ``demo``: both waveforms, how long a token took, and how long each phase took."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {"upstream": "#7f8c9b", "optimized": "#d1495b"}
BINS = 2000  # columns of a waveform: more than the picture has pixels
NOISE = 0.05  # seconds below which a ratio of single runs says nothing
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}

Pair = tuple[float, float]  # upstream's and optimized's


def draw(
    path: Path, waves: dict[str, np.ndarray], rate: int, token: Pair | None, seconds: dict[str, Pair], title: str
) -> None:
    """Write a PNG.

    Args:
        waves: samples (n,) at ``rate`` Hz by side, upstream first.
        token: milliseconds of T3 for one speech token; ``None`` where there is no T3, or too few tokens to tell.
        seconds: by phase, in the order of the bars.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # no window system needed, and no global backend set
        figure.suptitle(title, fontsize=13)
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.25], hspace=0.04)
        _waves(above, waves, rate)
        panels = below.subplots(1, 2, width_ratios=[1, 1.7]) if token else [None, below.subplots()]
        if token:
            _bars(panels[0], {"one token": token}, "ms", "T3: milliseconds for one speech token")
            panels[0].set_ylim(0.8, -0.8)  # or two bars would fill it
        _bars(panels[1], seconds, "s", "seconds of computation, by phase")
        bars = panels[1].containers
        below.legend(bars, [bar.get_label() for bar in bars], loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path)


def _waves(figure, waves: dict[str, np.ndarray], rate: int) -> None:
    rows = figure.subplots(len(waves), 1, sharex=True)
    longest = max(len(wave) for wave in waves.values()) / rate
    loudest = max(1e-3, *(float(np.abs(wave).max()) for wave in waves.values()))
    for axes, (side, wave) in zip(rows, waves.items(), strict=True):
        times, low, high = _envelope(wave, rate)
        axes.fill_between(times, low, high, color=COLORS[side], linewidth=0.4)
        axes.set(xlim=(0, longest), ylim=(-1.1 * loudest, 1.1 * loudest), ylabel="amplitude")
        axes.set_title(f"{side}: {len(wave) / rate:.1f} s of speech", loc="left", fontsize=10, color=COLORS[side])
    rows[-1].set_xlabel("time in the recording (s)")


def _envelope(wave: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least and greatest sample of each column: a line through every sample would hide the shape."""
    edges = np.unique(np.linspace(0, len(wave) - 1, BINS).astype(int))
    return edges / rate, np.minimum.reduceat(wave, edges), np.maximum.reduceat(wave, edges)


def _bars(axes, pairs: dict[str, Pair], unit: str, title: str) -> None:
    """Two bars a row with their values, and the ratio in bold behind the longer one."""
    places = np.arange(len(pairs))
    longest = max(value for pair in pairs.values() for value in pair) or 1.0
    for offset, side in ((-0.2, "upstream"), (0.2, "optimized")):
        values = [pair[side == "optimized"] for pair in pairs.values()]
        bars = axes.barh(places + offset, values, height=0.38, color=COLORS[side], label=side)
        axes.bar_label(bars, [_text(value, unit) for value in values], padding=4)
    for place, (before, after) in zip(places, pairs.values(), strict=True):
        told = ratio(before, after) if unit == "ms" or max(before, after) >= NOISE else ""
        axes.text(1.3 * longest, place, told, va="center", weight="bold", ha="center")
    axes.set(xlim=(0, 1.5 * longest), yticks=places, yticklabels=pairs, xlabel=f"{unit}, less is better")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 1.05 * longest])
    axes.invert_yaxis()


def _text(value: float, unit: str) -> str:
    if unit == "s" and value < 0.1:
        return f"{1000 * value:.1f} ms"
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def ratio(before: float, after: float) -> str:
    """How one time stands to another, in words."""
    if not (before and after):
        return ""
    faster = before / after
    if 0.95 < faster < 1.05:
        return "the same"
    return f"{faster:.1f}x faster" if faster > 1 else f"{1 / faster:.1f}x slower"
