"""The picture of ``vocoder evaluate``: spectrograms of one recording and of what vocoders make of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .plot import STYLE

WINDOW, HOP = 1024, 256
RANGE = 80.0  # dB below the loudest point of all


def draw(path: Path, samples: Mapping[str, np.ndarray], rate: int, title: str) -> None:
    """Write a PNG.

    Args:
        samples: (n,) at ``rate`` Hz by row.
    """
    levels = {name: _levels(wave) for name, wave in samples.items()}
    loudest = max(float(level.max()) for level in levels.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.2 + 2.2 * len(levels)), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)  # no window system needed, and no global backend set
        figure.suptitle(title, fontsize=13)
        rows = figure.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, level) in zip(rows, levels.items(), strict=True):
            seconds = len(samples[name]) / rate
            image = axes.imshow(
                level, origin="lower", aspect="auto", cmap="magma", vmin=loudest - RANGE, vmax=loudest,
                extent=(0, seconds, 0, rate / 2000), interpolation="nearest",
            )  # fmt: skip
            axes.set(ylabel="kHz")
            axes.set_title(name, loc="left", fontsize=11)
        rows[-1].set_xlabel("time (s)")
        figure.colorbar(image, ax=list(rows), label="dB")
        figure.savefig(path)


def _levels(wave: np.ndarray) -> np.ndarray:
    """dB (1 + WINDOW/2, t) of samples (n,)."""
    wave = np.pad(wave, (0, max(0, WINDOW - len(wave))))
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP] * np.hanning(WINDOW)
    return 20 * np.log10(np.maximum(np.abs(np.fft.rfft(frames, axis=1)).T, 1e-6))
