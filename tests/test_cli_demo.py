"""``demo``: its four files."""

from __future__ import annotations

import json

import pytest
from cli_tools import METRICS, command, watermark_in

from chatterbox_turbo.cli import main


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


def test_demo_of_voice_conversion(prebuilt, capsys, tmp_path):
    assert main(["demo", "--model", "vc", "--synthetic", "--size", "tiny", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["metrics"]) == METRICS - {"t3", "t3_step"}
    assert watermark_in(tmp_path / "optimized.wav") > 10
