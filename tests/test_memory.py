"""The memory that a model, its passes and its process have: figures, peaks, history, clearing, table and picture."""

from __future__ import annotations

import gc
import json
import mmap
import weakref

import pytest
import torch
from cases import only, request_for, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.config import MemorySection
from chatterbox_turbo.config.sections import MEMORY_PROFILES
from chatterbox_turbo.errors import InvalidRequestError, UnavailablePassError
from chatterbox_turbo.memory import table, weights
from chatterbox_turbo.passes import memory as memory_pass
from chatterbox_turbo.runtime.cpu import host_memory, process_memory
from chatterbox_turbo.runtime.device.transfers import KINDS, OTHER, Transfers
from chatterbox_turbo.runtime.memory import clearing, readings
from chatterbox_turbo.runtime.memory.clearing import LONG, CachePolicy, Tally
from chatterbox_turbo.runtime.memory.holdings import measure, tensors_in
from chatterbox_turbo.runtime.memory.meter import Meter
from chatterbox_turbo.upstream.families import identify

CPU = torch.device("cpu")
QUIET = {"progress": "off"}
glibc = pytest.mark.skipif(process_memory.heap() is None, reason="needs glibc 2.33 or newer")
linux = pytest.mark.skipif(not process_memory.STATUS.exists(), reason="needs Linux")


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


def fill_heap(mib: int) -> dict:
    """Leave freed blocks in the heap, below one that is in use; the heap's figures before they were freed."""
    blocks = [torch.empty(2**18, dtype=torch.uint8).fill_(1) for _ in range(4 * mib)]
    fill_heap.kept = blocks[-1]
    return readings.fragmentation(CPU)


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


@glibc
@linux
def test_clearing_gives_pages_back():
    fill_heap(64)
    tally = Tally()
    before = process_memory.resident().now
    clearing.clear(CPU, "here", tally)
    freed = before - process_memory.resident().now
    found = tally.to_dict()["here"]
    assert freed > 40 * 2**20 and found["count"] == 1 and found["bytes"] > 40 * 2**20 and found["seconds"] > 0


@glibc
def test_fragmentation_counts_what_is_free_in_the_heap():
    before = fill_heap(64)
    after = readings.fragmentation(CPU)
    assert after["free"] - before["free"] > 40 * 2**20
    assert 0 < after["fragmentation"] < 1 and after["fragmentation"] == after["free"] / after["heap"]


def test_when_a_policy_clears(monkeypatch):
    done = []
    monkeypatch.setattr(clearing, "clear", lambda device, place, tally: done.append(place))
    free = [50, 100]
    monkeypatch.setattr(readings, "free", lambda device: tuple(free))
    monkeypatch.setattr(readings, "idle", lambda device: clearing.WORTH)
    CachePolicy("never").after(CPU)
    CachePolicy("pressure", 0.1).after(CPU)
    assert done == []
    CachePolicy("between").after(CPU)
    free[0] = 9
    policy = CachePolicy("pressure", 0.1)
    policy.after(CPU)
    policy.after(CPU)  # at once again: pressure lasts, and clearing has not ended it
    assert done == ["between requests", "under pressure"]
    monkeypatch.setattr(readings, "idle", lambda device: clearing.WORTH - 1)
    CachePolicy("pressure", 0.1).after(CPU)
    assert len(done) == 2, "nothing worth it"


def test_the_vocoder_of_long_speech(monkeypatch):
    done = []
    monkeypatch.setattr(clearing, "clear", lambda device, place, tally: done.append(place))
    CachePolicy(vocoder=True).before_vocoder(CPU, LONG - 1)
    CachePolicy().before_vocoder(CPU, LONG)
    assert done == []
    CachePolicy(vocoder=True).before_vocoder(CPU, LONG)
    assert done == ["before the vocoder"]


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


def test_transfers():
    transfers = Transfers()
    transfers.record("a", 10, 0.5)
    transfers.record("a", 20, 0.25)
    transfers.record(what="b", bytes=1, seconds=0.0)
    found = transfers.to_dict()
    assert found["by"]["a"] == {"count": 2, "bytes": 30, "seconds": 0.75}
    assert (found["count"], found["bytes"], found["seconds"]) == (3, 31, 0.75)
    for number in range(2 * KINDS):
        transfers.record(f"{number}", 1, 0.0)
    found = transfers.to_dict()
    assert len(found["by"]) == KINDS + 1 and OTHER in found["by"] and found["count"] == 3 + 2 * KINDS
    transfers.clear()
    assert transfers.to_dict() == {"count": 0, "bytes": 0, "seconds": 0, "by": {}}


def test_a_meter_without_resets_says_what_it_may_have_missed(monkeypatch):
    now = [100, 500]
    monkeypatch.setattr(readings, "reading", lambda device: tuple(now))
    monkeypatch.setattr(readings, "reset_peak", lambda device: pytest.fail("a counter of the process was reset"))
    meter = Meter(CPU)
    with meter.request("generate"):
        with meter.phase("below"):
            now[0] = 200  # up to 500 meanwhile, for all that is known
        with meter.phase("above"):
            now[1] = 900
    assert meter.peaks == {"below": 200, "above": 900} and meter.missed
    assert meter.history()[0]["peak"] == 900


def test_a_meter_with_resets(monkeypatch):
    now = [100, 500]
    monkeypatch.setattr(readings, "reading", lambda device: tuple(now))

    def reset(device):
        now[1] = now[0]
        return True

    monkeypatch.setattr(readings, "reset_peak", reset)
    meter = Meter(CPU, exact=True)
    with meter.phase("one"):
        now[1] = 300
    assert meter.peaks == {"one": 300} and not meter.missed
    monkeypatch.setattr(readings, "reset_peak", lambda device: False)
    with meter.phase("two"):
        pass
    assert meter.missed and meter.peaks["two"] == 100


def test_the_history_is_bounded():
    meter = Meter(CPU, limit=3)
    for number in range(5):
        with meter.request(str(number)):
            pass
    assert [one["kind"] for one in meter.history()] == ["2", "3", "4"]


@linux
def test_the_highest_of_all_outlives_a_reset(monkeypatch):
    monkeypatch.setattr(readings, "_highest", {})
    pages = mmap.mmap(-1, 2**26)  # not of the heap, which may have as much to spare
    pages.write(bytes(2**26))
    high = readings.highest(CPU)
    pages.close()
    if not readings.reset_peak(CPU):
        pytest.skip("this system lets no process reset its peak")
    assert readings.reading(CPU)[1] < high - 2**24
    assert readings.highest(CPU) > high - 2**20  # Linux adds up what its processors count apart, at times late


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    files = {"max": "1000000", "current": "900000", "stat": "anon 1\ninactive_file 50000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    monkeypatch.setattr(process_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(process_memory, "GROUPS", ((*(str(tmp_path / name) for name in files), "inactive_file"),))
    assert process_memory.available() == (150_000, 1_000_000)
    (tmp_path / "max").write_text("max")
    assert process_memory.available() == (3000 * 1024, 4000 * 1024)


def test_a_system_without_proc(monkeypatch, tmp_path):
    for name in ("STATUS", "MEMINFO", "CLEAR_REFS"):
        monkeypatch.setattr(process_memory, name, tmp_path / "nothing" / name)
    pytest.importorskip("psutil")
    assert process_memory.resident().now > 2**20 and process_memory.resident().peak is None
    free, total = process_memory.available()
    assert 0 < free <= total
    assert process_memory.reset_peak() is False


def test_holdings_are_found_wherever_they_are():
    class Own:
        __slots__ = ("slot",)

    Own.__module__ = "chatterbox_turbo.tests"
    tensors = [torch.full((4,), float(number)) for number in range(6)]
    own = Own()
    own.slot = {"x": (tensors[0], [tensors[1]])}
    layer = torch.nn.Linear(2, 2, bias=False)
    closure = (lambda kept: lambda: kept)(tensors[2])
    weak = weakref.ref(tensors[3])
    found = list(tensors_in(own, layer, closure, weak, tensors[4][:2], tensors[4], own))
    assert {one.data_ptr() for one in found} == {one.data_ptr() for one in (*tensors[:3], layer.weight, tensors[4])}
    half = torch.zeros(8, dtype=torch.bfloat16)
    known = {tensors[0].untyped_storage().data_ptr()}
    sizes = measure([*tensors[:2], tensors[1][:1], half], known)
    assert sizes == {"cpu": {"float32": 16, "bfloat16": 16}}
    assert measure([half], known) == {}
