"""The memory pass and the figures on a simulated CUDA device, with PyTorch's own settings of its allocator."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import only, speak
from simulated_cuda import unsupported

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import TurboError
from chatterbox_turbo.runtime.device import captures
from chatterbox_turbo.runtime.memory import allocator, clearing, readings
from chatterbox_turbo.runtime.memory.allocator import Hold, parsed
from chatterbox_turbo.runtime.memory.clearing import CachePolicy, Tally

pytestmark = pytest.mark.skipif(bool(unsupported()), reason=unsupported() or "supported")
CUDA = torch.device("cuda", 0)
settable = pytest.mark.skipif(allocator._setter() is None, reason="a PyTorch without CUDA")


def alone(**options):
    return {**only(), "memory": {"enabled": True, **options}}


def in_force() -> tuple[bool, int]:
    """Expandable segments, and bytes from which blocks are not split, as the allocator has them."""
    known = torch.cuda.memory._snapshot()["allocator_settings"]
    return known["expandable_segments"], known["max_split_size"]


@pytest.fixture
def settings():
    """The allocator has the same settings after the test as before it. Asked for first, it ends after models."""
    before = in_force()
    yield
    assert in_force() == before and not allocator._held


@settable
def test_settings_are_in_force_until_revert(settings, simulated):
    model = simulated.get("turbo")
    turbo.apply(model, alone(expandable_segments=True, max_split_mb=64))
    assert in_force() == (True, 64 * 2**20)
    assert "expandable_segments:True, max_split_size_mb:64" in model.turbo.plan.step("memory").reason
    turbo.revert(model)
    assert in_force() == (False, -1)


@settable
def test_settings_that_were_there_stay_and_come_back(settings):
    torch.cuda.memory._set_allocator_settings("max_split_size_mb:300")
    try:
        first, second = Hold({"expandable_segments": "True"}), Hold({"max_split_size_mb": "64"})
        first.take()
        assert in_force() == (True, 300 * 2**20)
        second.take()
        assert in_force() == (True, 64 * 2**20)
        first.release()
        assert in_force() == (False, 64 * 2**20)
        second.release()
        second.release()
        assert in_force() == (False, 300 * 2**20)
    finally:
        torch.cuda.memory._set_allocator_settings("")


@settable
def test_a_setting_that_pytorch_does_not_know(settings):
    with pytest.raises((RuntimeError, ValueError)):
        Hold({"expandable_segments": "True", "nonsense": "1"}).take()


def test_a_failure_later_in_apply_takes_them_back(settings, simulated):
    class Failing(turbo.Pass):
        name = "failing"

        def apply(self, context):
            assert in_force()[0] or allocator._setter() is None
            raise TurboError("failed")

    with pytest.raises(TurboError, match="failed"):
        turbo.apply(simulated.get("turbo"), alone(profile="balanced"), passes=[Failing()])


def test_the_text_of_settings():
    text = "a:1, roundup_power2_divisions:[256:1,512:2,>:4],expandable_segments:True"
    assert parsed(text) == {
        "a": "1",
        "roundup_power2_divisions": "[256:1,512:2,>:4]",
        "expandable_segments": "True",
    }
    assert parsed("") == {}


@settable
def test_the_newer_api_is_used_where_it_is(monkeypatch):
    written = []
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "max_split_size_mb:99", raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", written.append, raising=False)
    hold = Hold({"expandable_segments": "True"})
    hold.take()
    hold.release()
    assert written == [
        "max_split_size_mb:99,expandable_segments:True",
        "max_split_size_mb:99,expandable_segments:False",
    ]
    assert allocator.variable() == "PYTORCH_ALLOC_CONF"


@settable
def test_what_was_allocated_before_is_said(settings, simulated):
    model, machine = simulated.get("turbo"), simulated.machine
    machine.segments = [
        {"device": 0, "total_size": 70 * 2**20, "is_expandable": False},
        {"device": 0, "total_size": 30 * 2**20, "is_expandable": True},
        {"device": 1, "total_size": 50 * 2**20, "is_expandable": False},
    ]
    turbo.apply(model, alone(profile="balanced"))
    reason = model.turbo.plan.step("memory").reason
    assert "from now on (70 MiB were allocated before" in reason
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment" in reason


def test_another_allocator(settings, simulated, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "cudaMallocAsync")
    model = simulated.get("turbo")
    with pytest.raises(TurboError, match="allocated by cudaMallocAsync"):
        turbo.apply(model, alone(expandable_segments=True))
    turbo.apply(model, {**only(), "memory": {"profile": "aggressive"}})
    assert "not allocator: memory is allocated by cudaMallocAsync" in model.turbo.plan.step("memory").reason
    assert "given back after each request" in model.turbo.plan.step("memory").reason


@settable
def test_load_sets_them_before_weights_are_there(settings, simulated, saved, monkeypatch):
    from chatterbox_turbo.upstream import loading

    seen, real = [], loading.load
    monkeypatch.setattr(loading, "load", lambda *args, **options: seen.append(in_force()[0]) or real(*args, **options))
    with synthetic.architecture("tiny"):
        model = turbo.load("turbo", "cuda", alone(profile="balanced"), folder=saved("turbo"))
    assert seen == [True] and in_force()[0]
    turbo.revert(model)
    assert not in_force()[0]


def test_the_default_touches_nothing(settings, simulated):
    model, machine = simulated.get("turbo"), simulated.machine
    turbo.apply(model, alone())
    assert not in_force()[0] and not allocator._held
    machine.free = 0
    speak(model)
    assert machine.emptied == 0 and machine.peak == 2**21, "neither the cache nor the process's counters"


def test_the_cache_is_emptied_by_the_policy(simulated):
    model, machine = simulated.get("turbo"), simulated.machine
    turbo.apply(model, alone(clear="between"))
    machine.reserved, machine.inactive = 9 * 2**20, 2**20
    speak(model)
    found = model.turbo.memory()
    assert machine.emptied == 1
    assert found["clearings"]["between requests"]["bytes"] == 7 * 2**20
    turbo.apply(model, alone(clear="pressure"))
    machine.reserved = 2**30
    speak(model)
    assert machine.emptied == 1
    machine.free = 2**30
    speak(model)
    assert machine.emptied == 2 and model.turbo.memory()["clearings"]["under pressure"]["count"] == 1


def test_the_cache_is_not_emptied_while_a_graph_is_captured(simulated):
    machine, tally = simulated.machine, Tally()
    with captures.capturing():
        thread = threading.Thread(target=clearing.clear, args=(CUDA, "here", tally))
        thread.start()
        thread.join()
    assert machine.emptied == 0
    assert tally.to_dict()["here"] == {
        "count": 0, "seconds": 0.0, "bytes": 0, "skipped": 1, "reason": "a CUDA graph was being captured",
    }  # fmt: skip
    machine.recording_pool = object()  # a capture of somebody else's
    try:
        CachePolicy("between", tally=tally).after(CUDA)
    finally:
        machine.recording_pool = None
    assert "captures_underway" in tally.to_dict()["between requests"]["reason"]
    assert "not 1 times" in str(tally)


def test_figures_of_a_gpu(simulated, monkeypatch):
    monkeypatch.setattr(readings, "_highest", {})
    model, machine = simulated.get("turbo"), simulated.machine
    turbo.apply(model, alone(peaks=True))
    machine.peak = 7 * 2**20
    machine.segments = [
        {"device": 0, "total_size": 40, "allocated_size": 30, "segment_pool_id": (0, 3)},
        {"device": 0, "total_size": 20, "allocated_size": 10, "segment_pool_id": (0, 0)},
        {"device": 1, "total_size": 10, "allocated_size": 10, "segment_pool_id": (0, 4)},
    ]
    machine.reserved, machine.inactive = 4 * 2**20, 2**19
    speak(model)
    found = model.turbo.memory()
    assert found["cuda_peak"] == 7 * 2**20, "although the counter began anew for each phase"
    assert machine.peak == found["peaks"]["t3"] == machine.allocated == found["cuda_allocated"]
    assert found["graph_pools"] == {"reserved": 40, "allocated": 30}
    assert found["fragmentation"] == {
        "reserved": 4 * 2**20, "allocated": 2**20, "inactive_split": 2**19, "fragmentation": 0.75,
    }  # fmt: skip
    assert found["measured"] == {"what": "memory allocated by PyTorch on the device", "missed": False}
    assert {entry["device"] for name, entry in found["parts"].items() if name != "watermarker"} == {"cuda:0"}
    assert "75% of it idle" in str(found)
