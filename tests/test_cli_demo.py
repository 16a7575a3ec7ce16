"""``demo``: its four files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_tools import METRICS, command, watermark_in
from matplotlib.figure import Figure

from chatterbox_turbo.cli import main, plot


def test_demo_writes_its_four_files_and_says_that_the_weights_are_random(tmp_path):
    arguments = ("demo", "--size", "tiny", "--out", "results", "--stop-after", "30")
    done = command(tmp_path, *arguments, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout and "no weights are cached" in done.stdout
    folder = tmp_path / "results"
    for name in ("upstream.wav", "optimized.wav"):
        assert watermark_in(folder / name) == pytest.approx(30 / 25)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = json.loads((folder / "report.json").read_text())
    assert report["command"] == f"chatterbox-turbo {' '.join(arguments)}"
    assert report["synthetic"] is True
    assert report["watermarked"] == {"upstream": True, "optimized": True}
    assert report["comparison"]["token_agreement"] == 1.0 and report["comparison"]["snr_db"] > 60
    assert set(report["metrics"]) == METRICS and report["unmatched"] == []
    assert {side: run["tokens"] for side, run in report["runs"][0].items()} == {"upstream": 31, "optimized": 31}
    assert {step["name"] for step in report["passes"] if step["status"] == "on"} >= {"decoding", "watermark"}


@pytest.mark.exhaustive
def test_demo_of_voice_conversion(prebuilt, capsys, tmp_path):
    assert main(["demo", "--model", "vc", "--synthetic", "--size", "tiny", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["metrics"]) == METRICS - {"t3", "t3_step"}
    assert watermark_in(tmp_path / "optimized.wav") > 10


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """``drawn(token, seconds)``: the axes of such a picture, waveforms first."""
    figures = []

    def draw(token, seconds):
        with monkeypatch.context() as patch:
            patch.setattr(plot, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
            waves = {"upstream": np.zeros(2400, np.float32), "optimized": np.ones(1200, np.float32)}
            plot.draw(tmp_path / "picture.png", waves, 2400, token, seconds, "a title")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
        return figures[-1].axes

    return draw


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_the_picture_keeps_units_apart(drawn):
    _, _, token, phases = drawn((230.0, 50.0), {"T3": (20.0, 5.0), "flow": (8.0, 8.1), "watermark": (0.02, 0.01)})
    assert (token.get_xlabel(), phases.get_xlabel()) == ("ms, less is better", "s, less is better")
    assert words(token) == ["230 ms", "50 ms", "4.6x faster"]
    expected = ["20 s", "8 s", "20.0 ms", "5 s", "8.1 s", "10.0 ms", "4.0x faster", "the same", ""]
    assert words(phases) == expected  # and no ratio of what is too short
    longest = max(bar.get_width() for bars in phases.containers for bar in bars)
    assert longest == 20.0 and phases.get_xlim()[1] < 2 * longest
    for axes in (token, phases):  # nothing reaches into the column of ratios
        right = axes.get_xlim()[1]
        assert all(bar.get_width() < 0.7 * right for bars in axes.containers for bar in bars)


def test_without_t3_there_is_one_panel(drawn):
    *waves, phases = drawn(None, {"flow": (8.0, 10.0), "end to end": (9.0, 0.0)})
    assert len(waves) == 2 and words(phases)[-2:] == ["1.2x slower", ""]
