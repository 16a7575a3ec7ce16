"""Memory below the models: clearing, peaks and history, what the system tells, tensors that objects hold."""

from __future__ import annotations

import mmap
import weakref

import pytest
import torch

from chatterbox_turbo.runtime.cpu import process_memory
from chatterbox_turbo.runtime.device.transfers import KINDS, OTHER, Transfers
from chatterbox_turbo.runtime.memory import clearing, readings
from chatterbox_turbo.runtime.memory.clearing import LONG, CachePolicy, Tally
from chatterbox_turbo.runtime.memory.holdings import measure, tensors_in
from chatterbox_turbo.runtime.memory.meter import Meter

CPU = torch.device("cpu")
glibc = pytest.mark.skipif(process_memory.heap() is None, reason="needs glibc 2.33 or newer")
linux = pytest.mark.skipif(not process_memory.STATUS.exists(), reason="needs Linux")


def fill_heap(mib: int) -> dict:
    """Leave freed blocks in the heap, below one that is in use; the heap's figures before they were freed."""
    blocks = [torch.empty(2**18, dtype=torch.uint8).fill_(1) for _ in range(4 * mib)]
    fill_heap.kept = blocks[-1]
    return readings.fragmentation(CPU)


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


def test_a_system_without_proc(monkeypatch, tmp_path):
    for name in ("STATUS", "CLEAR_REFS"):
        monkeypatch.setattr(process_memory, name, tmp_path / "nothing" / name)
    pytest.importorskip("psutil")
    assert process_memory.resident().now > 2**20 and process_memory.resident().peak is None
    free, total = process_memory.available(tmp_path)
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
