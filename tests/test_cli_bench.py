"""``bench``: pairs of runs, their ratios, and where they were made."""

from __future__ import annotations

import json
import mmap
import time

import pytest
from cli_tools import METRICS, command


def test_bench_interleaves_pairs_and_says_where_it_ran(tmp_path, voice):
    done = command(
        tmp_path, "bench", "--size", "tiny", "--synthetic", "--runs", "2", "--voice", voice, "--json", "b.json"
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "b.json").read_text())
    assert set(data["metrics"]) == {*METRICS, "conditionals", "bandwidth_share"}
    for run in (run for pair in data["runs"] for run in pair.values()):
        assert run["memory_bandwidth_bytes_per_second"] > 1e8 and run["t3_bytes_per_token"] > 1e7
    assert len(data["runs"]) == 2
    assert {"torch", "transformers", "chatterbox-tts", "python"} <= set(data["versions"])
    assert {"cpu", "cores", "gpu"} <= set(data["machine"]) and data["date"]
    for name in ("T3, prefill included", "flow matching", "vocoder", "real-time factor", "share of memory bandwidth"):
        assert name in done.stdout
    assert data["command"] in done.stdout
    assert "run 2 of 2" in done.stderr and "run 2 of 2" not in done.stdout


def _run(seconds: float, tokens: int = 10):
    import torch

    from chatterbox_turbo.measure.benchmark import Run
    from chatterbox_turbo.measure.fidelity import Sample

    ids = torch.zeros(1, tokens, dtype=torch.int64)
    phases = {"t3": seconds / 2, "flow": seconds / 4}
    return Run(Sample(ids, torch.zeros(1, 24000), phases, seconds), 1.0, 2**20, seconds / 20, 1000, 1e5)


def test_ratios_are_medians_over_pairs():
    from chatterbox_turbo.measure.benchmark import Benchmark
    from chatterbox_turbo.measure.fidelity import Comparison

    pairs = [(_run(4), _run(2)), (_run(9), _run(3)), (_run(10), _run(10))]
    result = Benchmark(pairs, None, Comparison(1.0, None, 0.0, True), [0.0])
    metrics = {metric.name: metric for metric in result.metrics}
    end = metrics["end_to_end"]
    assert (end.ratio, end.upstream.median, end.upstream.min, end.upstream.max) == (2.0, 9, 4, 10)
    assert metrics["t3"].upstream.median == 450.0  # ms a token
    assert metrics["t3_step"].upstream.median == 450.0
    assert metrics["bandwidth_share"].optimized.median == pytest.approx(1000 / 0.15 / 1e5)
    assert result.unmatched == []


def test_peak_memory_sees_what_is_freed_again():
    import torch

    from chatterbox_turbo.measure.levels import memory_levels

    with memory_levels(torch.device("cpu")) as idle:
        pass
    # from the system, not from what the allocator has kept
    with memory_levels(torch.device("cpu")) as levels, mmap.mmap(-1, 200 * 2**20) as block:
        for start in range(0, len(block), 4096):
            block[start] = 1
        time.sleep(0.1)
    assert levels.highest - idle.highest > 100 * 2**20


def test_bytes_of_a_token_are_the_backbones_and_the_heads(english):
    from chatterbox_turbo.measure.benchmark import t3_bytes
    from chatterbox_turbo.upstream.families import identify

    layer = 4 * 256 * 256 + 3 * 256 * 128 + 2 * 256  # attention, MLP of 128, two norms
    assert t3_bytes(identify(english)) == 4 * (2 * layer + 256 + english.t3.speech_head.weight.numel())


def test_a_warm_up_leaves_voice_and_generator(english, voice):
    import torch

    from chatterbox_turbo.measure.benchmark import warm_up

    before, conds = torch.get_rng_state(), english.conds
    warm_up(english, {"text": "Hello.", "audio_prompt_path": voice})
    assert torch.equal(torch.get_rng_state(), before) and english.conds is conds
