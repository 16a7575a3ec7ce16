"""The memory that a model and its passes have: figures, history, table, picture; profiles and what they clear."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from cases import only, request_for, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.config import MemorySection
from chatterbox_turbo.config.sections import MEMORY_PROFILES
from chatterbox_turbo.errors import InvalidRequestError, UnavailablePassError
from chatterbox_turbo.memory import table, weights
from chatterbox_turbo.passes import memory as memory_pass
from chatterbox_turbo.runtime.cpu import host_memory
from chatterbox_turbo.runtime.memory import clearing
from chatterbox_turbo.runtime.memory.clearing import Tally
from chatterbox_turbo.upstream.families import identify

CPU = torch.device("cpu")
QUIET = {"progress": "off"}


@pytest.fixture(scope="module")
def spoken(models):
    """A model that has spoken twice, and its memory then."""
    model = models("turbo")
    config = only()
    config["fidelity"] = "numerical"
    config |= {name: {"enabled": "auto"} for name in ("flow", "vocoder", "conditioning")}
    config["memory"] = {"enabled": True, "profile": "aggressive", "peaks": True}
    config["watermark"] = {"device": "model"}
    config["decoding"] = {**QUIET, "kernel": "torch"}
    with turbo.optimized(model, config):
        for seed in range(2):
            speak(model, seed)
        model.turbo._transfers.record("tokenizer to cpu", 5 * 2**20, 0.25)
        yield model, model.turbo.memory()


def test_what_callers_have_read_so_far_is_there(spoken):
    model, found = spoken
    parts = identify(model).modules()
    assert set(found["parts"]) == set(parts)
    sizes = {name: sum(t.numel() * t.element_size() for t in one.state_dict().values()) for name, one in parts.items()}
    for name, entry in found["parts"].items():
        assert entry["bytes"] >= sizes[name] > 0 and entry["device"] == "cpu"
        assert sum(entry["by"]["cpu"].values()) == entry["bytes"]
    assert found["weights"] == sum(entry["bytes"] for entry in found["parts"].values())


def test_what_passes_hold_beside_the_weights(spoken):
    model, found = spoken
    copy = found["held"]["watermark copy"]
    encoder = model.watermarker.perth_net.encoder
    assert copy["bytes"] >= sum(p.numel() * 4 for p in encoder.parameters())
    assert found["held"]["flow"]["bytes"] > 0 < found["held"]["vocoder"]["bytes"]
    weight_bytes = found["parts"]["s3gen.flow"]["bytes"]
    assert found["held"]["flow"]["bytes"] < weight_bytes, "the weights themselves are no copies"
    assert found["held_bytes"] == sum(entry["bytes"] for entry in found["held"].values())


def test_voices_that_are_kept_count(spoken, voice):
    model, found = spoken
    assert "voices" not in found["held"]
    before = model.conds
    try:
        with model.turbo.lock:
            model.prepare_conditionals(voice)
        now = model.turbo.memory()
        assert now["held"]["voices"]["bytes"] == model.turbo.voices.nbytes > 0
        assert "conditionals" in now["peaks"], "also outside of a request"
    finally:
        model.conds = before
        model.turbo.voices.clear()


def test_peaks_and_history(spoken):
    _, found = spoken
    assert {"t3", "flow", "vocoder", "watermark"} <= set(found["peaks"])
    assert found["measured"]["what"] == "resident memory of the process"
    assert [one["kind"] for one in found["history"]] == ["generate"] * 2
    for one in found["history"]:
        assert [phase["name"] for phase in one["phases"]] == ["t3", "flow", "vocoder", "watermark"]
        assert one["peak"] >= max(one["before"], one["after"]) > 0
        assert all(phase["peak"] <= found["peaks"][phase["name"]] for phase in one["phases"])
        assert sum(phase["seconds"] for phase in one["phases"]) < one["seconds"]


def test_it_is_data_and_a_table(spoken):
    model, found = spoken
    assert json.loads(json.dumps(found)) == found
    said = str(found)
    for wanted in ("s3gen.tokenizer", "+ watermark copy", "float32", "peaks by phase", "given back between requests"):
        assert wanted in said, said
    assert "moved: 1 times, 5.0 MiB, 0.250 s" in said
    assert {len(row) for row in found.rows()} == {len(table.COLUMNS)}
    report = str(model.turbo.report())
    assert "beside the weights" in report and "between requests 2 times" in report
    json.dumps(model.turbo.report().to_dict())


def test_the_picture(spoken, tmp_path):
    pytest.importorskip("matplotlib")
    _, found = spoken
    path = found.plot(tmp_path / "memory.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_there_is_no_picture_before_the_first_request(models, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidRequestError, match="no history"):
        weights(identify(models("turbo"))).plot(tmp_path / "memory.png")


def test_a_batch_is_one_request(models):
    model = models("turbo")
    with turbo.optimized(model, {"decoding": {**QUIET, "kernel": "torch"}, "memory": {"clear": "between"}}):
        model.turbo.batch([{"text": "One.", "seed": 1}, {"text": "Two.", "seed": 2}])
        found = model.turbo.memory()
    (one,) = found["history"]
    assert one["kind"] == "batch" and [phase["name"] for phase in one["phases"]] == ["batch"]
    assert found["clearings"]["between requests"]["count"] == 1


def test_a_kept_handle_keeps_nothing_of_what_passes_have_made(models):
    model = models("turbo")
    config = {**only(), "fidelity": "numerical", "watermark": {"device": "model"}, "memory": {"clear": "between"}}
    handle = turbo.apply(model, config).turbo
    assert "watermark copy" in handle.memory()["held"]
    turbo.revert(model)
    gc.collect()
    assert "watermark copy" not in handle.memory()["held"]


def test_an_error_in_a_request_is_in_the_history_and_cleared_after(models):
    model = models("turbo")
    with turbo.optimized(model, {"decoding": {**QUIET, "kernel": "torch"}, "memory": {"clear": "between"}}):
        with pytest.raises(InvalidRequestError):
            model.generate(**{**request_for(model), "temperature": float("nan")})
        found = model.turbo.memory()
    assert len(found["history"]) == 1 and found["clearings"]["between requests"]["count"] == 1


@pytest.mark.parametrize("profile", MEMORY_PROFILES)
def test_profiles(profile, models, monkeypatch):
    """By default as ever: blocks are kept, and nothing is given back after requests."""
    kept = []
    monkeypatch.setattr(memory_pass, "keep_freed_blocks", lambda: kept.append(1))
    monkeypatch.setattr(memory_pass, "gives_back", lambda: True)
    monkeypatch.setattr(clearing, "gives_back", lambda: True)
    model = models("turbo")
    with turbo.optimized(model, {**only(), "memory": {"enabled": True, "profile": profile}}):
        policy = model.turbo._caches
        assert bool(model.turbo._settings) == (profile != "conservative")
    assert policy.when == MEMORY_PROFILES[profile]["clear"] and policy.vocoder
    assert bool(kept) == MEMORY_PROFILES[profile]["keep_blocks"]
    assert MemorySection().profile == "conservative"


def test_an_option_wins_over_the_profile():
    section = MemorySection(profile="aggressive", clear="never", keep_blocks=True)
    assert section.chosen("clear") == "never" and section.chosen("keep_blocks") is True
    assert section.chosen("expandable_segments") is True


def test_another_c_library(models, monkeypatch):
    monkeypatch.setattr(host_memory, "_trim", lambda: None)
    model = models("turbo")
    with pytest.raises(UnavailablePassError, match="not glibc"):
        turbo.apply(model, {"memory": {"enabled": True, "clear": "between"}})
    with turbo.optimized(model, {**only(), "memory": {"clear": "between"}}):
        assert "not clear: this C library is not glibc" in str(model.turbo.report())
        assert not model.turbo._settings
    clearing.clear(CPU, "here", tally := Tally())
    assert tally.to_dict() == {}


def test_settings_of_cuda_are_refused_on_a_cpu(models):
    model = models("turbo")
    with pytest.raises(UnavailablePassError, match="max_split_mb is of PyTorch's CUDA allocator"):
        turbo.apply(model, {"memory": {"enabled": True, "max_split_mb": 64}})
    with turbo.optimized(model, {"memory": {"expandable_segments": True}}):
        assert "not allocator: memory.expandable_segments is of" in model.turbo.plan.step("memory").reason


@pytest.mark.parametrize("replaced", [lambda model: clearing.replaced(), lambda model: turbo.apply(model).turbo])
def test_what_apply_gives_back_is_counted(models, replaced, monkeypatch):
    monkeypatch.setattr(clearing, "replacing", Tally())
    model = models("turbo")
    replaced(model)
    turbo.revert(model)
    assert clearing.replacing.to_dict()["while weights were replaced"]["count"] >= 1
