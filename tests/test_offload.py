"""Parts that leave a CPU's memory: pages go and come back, values, addresses and what is made of them stay."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import offload_tools
import pytest
import torch
from cases import request_for, speak
from offload_tools import QUIET, apply, lines, pages, residence_of
from snapshots import difference, snapshot

import chatterbox_turbo as turbo
from chatterbox_turbo import OptimizationConfig
from chatterbox_turbo.errors import InvalidConfigError, TurboError, UnavailablePassError
from chatterbox_turbo.runtime.cpu import cold
from chatterbox_turbo.runtime.cpu.cold import ColdPages, ColdPart

own, model = offload_tools.own, offload_tools.model
pytestmark = pytest.mark.skipif(bool(cold.why_not()), reason=cold.why_not() or "runs here")


# ---- pages


def test_pages_go_and_come_back(tmp_path):
    """Two views of one storage go on being that; what is written stays, also where pages are let go again."""
    whole = torch.arange(2**18, dtype=torch.float32).reshape(512, 512)
    first, second = torch.nn.Parameter(whole[:256]), torch.nn.Parameter(whole[256:])
    copy = whole.clone()
    del whole
    part = ColdPart([first, second], tmp_path)
    assert part.leave() >= 2**20
    assert os.listdir(tmp_path) == []  # the file has no name
    laid, at = part.pages, first.data_ptr()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    laid.drop()
    assert laid.resident() == 0
    assert torch.equal(first, copy[:256]) and torch.equal(second, copy[256:])
    assert laid.resident() >= 2**20
    with torch.no_grad():
        first[3, 4] = -1.0
    assert part.leave() >= 2**20 - cold.PAGE
    assert laid.resident() == cold.PAGE  # the one that was written to
    assert first[3, 4] == -1.0 and first.data_ptr() == at
    part.restore()
    copy[3, 4] = -1.0
    assert torch.equal(first, copy[:256]) and first.data_ptr() != at
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    gc.collect()
    assert not lines(str(tmp_path))


def test_weights_of_a_mapped_checkpoint_stay_in_its_file(tmp_path):
    """Nothing is written for them, and their pages go."""
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.randn(512, 512)}, tmp_path / "a.safetensors")
    weight = load_file(tmp_path / "a.safetensors")["a"]
    total, at = weight.sum(), weight.data_ptr()
    laid = ColdPages([weight], tmp_path / "missing")
    assert laid.spilled == 0 and laid.nbytes > 0 and weight.data_ptr() == at
    assert laid.drop() > 0 and laid.resident() == 0
    assert weight.sum() == total
    laid.restore()
    assert weight.data_ptr() == at


def test_a_full_disk(model, monkeypatch):
    """The model is as it was, and the message says what to do."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = snapshot(model)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TurboError, match=r"No space left.*offload\.folder"):
        apply(model, "idle")
    assert difference(before, snapshot(model)) == []
    assert not hasattr(model, "turbo")


def test_where_pages_cannot_go(model, monkeypatch, tmp_path):
    assert "tmpfs" in cold.spill_folder("/dev/shm")[1] or cold._kind_of(Path("/dev/shm")) not in cold.IN_MEMORY
    apply(model, "idle", folder=str(tmp_path / "nowhere"))
    assert model.turbo.plan.step("offload").status == "skipped"
    assert "offload.folder" in model.turbo.plan.step("offload").reason
    monkeypatch.setattr(cold, "PAGEMAP", tmp_path / "pagemap")
    with pytest.raises(UnavailablePassError, match="pagemap"):
        apply(model, "idle", enabled=True)


def test_contradictions():
    with pytest.raises(InvalidConfigError, match="free_again"):
        OptimizationConfig(offload={"mode": "adaptive", "free_below": 0.3})
    with pytest.raises(InvalidConfigError, match="mode is off"):
        OptimizationConfig(offload={"enabled": True})


# ---- modes


def test_sequential(model, voice):
    """Same samples; between requests nothing is resident, and nothing is made anew."""
    turbo.apply(model, QUIET)
    plain = speak(model)
    apply(model, "sequential")
    assert torch.equal(speak(model), plain)
    engines = model.turbo._engines
    every = (engines.token_model.prepared, engines.flow.prepared, engines.vocoder.prepared)
    values = [prepared.value for prepared in every]
    for name in ("voice", "t3", "flow", "vocoder"):
        assert pages(model, name).resident() <= 2 * cold.PAGE, name
    model.prepare_conditionals(voice)
    assert pages(model, "voice").resident() <= 2 * cold.PAGE
    speak(model)
    assert [prepared.value for prepared in every] == values
    assert model.turbo.renewals == ()
    assert "sequential: voice" in model.turbo.plan.step("offload").reason
    moved = residence_of(model)._transfers.to_dict()["by"]
    assert moved["t3 leaves"]["count"] >= 2


def test_idle_keeps_what_speaks(model, voice):
    apply(model, "idle")
    addresses = [p.data_ptr() for p in model.t3.parameters()]
    speak(model, audio_prompt_path=voice)
    assert pages(model, "voice").resident() <= 2 * cold.PAGE
    assert pages(model, "t3") is None and [p.data_ptr() for p in model.t3.parameters()] == addresses


def test_voice_conversion_keeps_its_tokenizer(fresh):
    vc = fresh("vc")
    apply(vc, "sequential")
    try:
        held = {id(t) for place in residence_of(vc).places.values() for t in place._tensors}
        assert not held & {id(p) for p in vc.s3gen.tokenizer.parameters()}
        assert held >= {id(p) for p in vc.s3gen.speaker_encoder.parameters()}
        speak(vc)
    finally:
        turbo.revert(vc)


def test_revert_brings_everything_back(model):
    speak(model)  # upstream keeps an embedding in the voice
    before = snapshot(model)
    mapped = len(lines("(deleted)"))
    apply(model, "sequential")
    speak(model)
    assert len(lines("(deleted)")) > mapped
    turbo.revert(model)
    gc.collect()
    assert difference(before, snapshot(model)) == []
    assert len(lines("(deleted)")) == mapped


@pytest.mark.exhaustive
def test_many_requests(model):
    """Placement, hooks, mappings and weights as after the first."""
    apply(model, "sequential")
    speak(model)

    def state():
        gc.collect()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.t3.modules())
        resident = [pages(model, name).resident() for name in residence_of(model).places]
        addresses = [p.data_ptr() for p in (*model.t3.parameters(), *model.s3gen.parameters())]
        return hooks, resident, addresses, len(lines("(deleted)")), len(os.listdir("/proc/self/fd"))

    first = state()
    for _ in range(30):
        speak(model, text="Yes.")
    speak(model)
    assert state() == first


def test_two_models(model, fresh):
    other = fresh("turbo")
    turbo.apply(model, QUIET)
    turbo.apply(other, QUIET)
    plain = speak(model), speak(other)
    apply(model, "sequential")
    apply(other, "sequential")
    try:
        for _ in range(2):
            assert torch.equal(speak(model), plain[0])
            assert torch.equal(speak(other), plain[1])
    finally:
        turbo.revert(other)


def test_batches(model):
    items = [{**request_for(model, text), "seed": seed} for seed, text in enumerate(("One.", "Two and three."))]
    turbo.apply(model, QUIET)
    plain = model.turbo.batch(items)
    apply(model, "sequential")
    transfers = residence_of(model)._transfers
    transfers.clear()
    assert all(map(torch.equal, model.turbo.batch(items), plain))
    assert transfers.to_dict()["by"]["t3 leaves"]["count"] == 1  # not once for each utterance
    assert pages(model, "t3").resident() <= 2 * cold.PAGE
