"""The simulated CUDA machine itself: what it computes, records and refuses."""

from __future__ import annotations

import threading

import pytest
import torch
from simulated_cuda import ForbiddenSync, simulated_cuda, unsupported

pytestmark = pytest.mark.skipif(bool(unsupported()), reason=unsupported() or "supported")
GARBAGE = -77_777


@pytest.fixture
def machine():
    with simulated_cuda() as machine:
        yield machine


def capture(function, *inputs, pool=None, generators=()):
    """The graph of ``function`` over ``inputs``, and its outputs."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(inputs[0].device)
    for one in generators:
        graph.register_generator_state(one)
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = function(*inputs)
    return graph, outputs


def test_values_devices_and_counts(machine):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    y = (x @ x.T + 1)[:, 1:]
    assert y.device == torch.device("cuda", 0) and y.is_cuda and machine.counts["kernels"] == 3
    assert not machine.recorded
    assert y.cpu().flatten().tolist() == [15.0, 51.0]
    assert [one.kind for one in machine.recorded] == ["sync"] and "test_simulated_machine.py" in machine.recorded[
        0
    ].place


def test_operands_on_two_devices_are_refused(machine):
    here, there, host = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1"), torch.ones(2)
    for other in (there, host):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([here[:0], host])
    assert (here + torch.tensor(1.0)).tolist() == [2.0, 2.0]  # a number on the host is welcome
    assert (here + there.to("cuda:0")).tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="cuda:2")


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("sync", lambda x: x.item()),
        ("sync", lambda x: x.tolist()),
        ("sync", lambda x: x.cpu()),
        ("sync", lambda x: bool(x[0] > 1)),
        ("sync", lambda x: x[x > 0]),
        ("sync", lambda x: x.nonzero()),
        ("sync", lambda x: torch.empty(1).copy_(x, non_blocking=True)),
        ("sync", lambda x: torch.cuda.current_stream().synchronize()),
        ("host_to_device", lambda x: torch.tensor([1.0], device="cuda")),
        ("host_to_device", lambda x: torch.ones(1).to("cuda", non_blocking=True)),
        ("host_to_device", lambda x: x.copy_(torch.ones(1))),
        ("host_to_device", lambda x: x[torch.tensor([0])]),
    ],
)
def test_waits_are_recorded_and_can_be_forbidden(machine, kind, act):
    x = torch.zeros(1, device="cuda")
    with machine.watching() as seen:
        act(x)
    assert [one.kind for one in seen.waits] == [kind]
    with pytest.raises(ForbiddenSync, match="test_simulated_machine"), machine.forbid_syncs():
        act(x)
    with pytest.raises(RuntimeError, match=r"capturing|previous error"):
        capture(act, x)
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing") as warned:
        act(x)
    assert warned[0].filename == __file__
    torch.cuda.set_sync_debug_mode("default")


def test_pinned_memory_holds_garbage_until_the_right_wait(machine):
    x, pinned = torch.full((2,), 7, device="cuda:1"), torch.empty(2, dtype=torch.long, pin_memory=True)
    assert pinned.is_pinned() and not torch.empty(2).is_pinned()
    with machine.forbid_syncs():
        pinned.copy_(x, non_blocking=True)
        elsewhere, there = torch.cuda.Event(), torch.cuda.Event()
        elsewhere.record()  # of device 0, which is current
        there.record(torch.cuda.current_stream("cuda:1"))
        elsewhere.synchronize()
        assert pinned.tolist() == [GARBAGE, GARBAGE] and not there.query()
        there.synchronize()
        assert pinned.tolist() == [7, 7] and there.query()
        uploaded = torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    assert uploaded.tolist() == [1, 1] and machine.counts["upload"] == 1
    with pytest.raises(RuntimeError, match="does not match"):
        there.record()


def test_pinned_memory_is_made_by_any_factory(machine):
    x = torch.ones(2, device="cuda")
    for make in (
        lambda: torch.empty(2, pin_memory=True),
        lambda: torch.empty_like(x, device="cpu", pin_memory=True),
        lambda: torch.zeros(2).pin_memory(),
    ):
        for mode in (True, False):
            with torch.inference_mode(mode):
                pinned = make()
            with torch.inference_mode(not mode), machine.forbid_syncs():
                pinned.copy_(x, non_blocking=True) if not pinned.is_inference() else None
                event = torch.cuda.current_stream().record_event()
                event.synchronize()
            assert pinned.is_pinned()


def test_an_event_of_a_stream_that_waited_is_enough(machine):
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    pinned, event = torch.empty(1, pin_memory=True), torch.cuda.Event()
    with torch.cuda.stream(side):
        pinned.copy_(torch.ones(1, device="cuda"), non_blocking=True)
    event.record()
    event.synchronize()
    assert pinned.item() == GARBAGE
    main.wait_stream(side)
    main.record_event().synchronize()
    assert pinned.item() == 1


def test_a_graph_replays_operations_and_no_python(machine):
    x, state, runs = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), []

    def function(x):
        runs.append(1)
        state.add_(1)
        return x * 2 + state

    graph, out = capture(function, x)
    assert state.tolist() == [0, 0] and all(value != value for value in out.tolist())  # nothing has run yet
    with machine.watching() as seen:
        for _ in range(2):
            graph.replay()
    assert runs == [1] and state.tolist() == [2, 2] and out.tolist() == [4, 4]
    assert graph.kernels == 3 and seen.counts["replays"] == 2
    x.fill_(10)
    graph.replay()
    assert out.tolist() == [23, 23]


def test_graphs_of_a_pool_overwrite_each_other(machine):
    x, pool = torch.ones(1, device="cuda"), torch.cuda.graph_pool_handle()
    first, one = capture(lambda x: x + 1, x, pool=pool)
    second, _ = capture(lambda x: x + 2, x, pool=pool)
    first.replay()
    assert one.item() == 2
    second.replay()
    assert one.item() != one.item()


def test_random_numbers_of_a_graph_are_those_of_its_generator(machine):
    x, own = torch.empty(3, device="cuda"), torch.Generator("cuda")
    expected = [x.exponential_(generator=own.manual_seed(seed)).tolist() for seed in (5, 6)]
    with pytest.raises(RuntimeError, match=r"not in capture mode|previous error"):
        capture(lambda x: x.exponential_(generator=own), x)
    torch.cuda.default_generators[0].capturing = None  # what a failed capture leaves behind
    graph, _ = capture(lambda x: x.exponential_(generator=own), x, generators=[own])
    for seed, numbers in zip((5, 6), expected, strict=True):
        own.manual_seed(seed)
        graph.replay()
        assert x.tolist() == numbers
    default, _ = capture(lambda x: x.normal_(), x)  # registered by itself
    torch.cuda.manual_seed(3)
    default.replay()
    numbers = x.tolist()
    torch.cuda.manual_seed(3)
    assert x.normal_().tolist() == numbers
    with pytest.raises(RuntimeError, match="generator"):
        x.normal_(generator=torch.Generator())
    with pytest.raises(RuntimeError, match="generator"):
        x.normal_(generator=torch.Generator("cuda:1"))


def test_other_threads_begin_on_the_first_device_and_may_not_draw_during_a_capture(machine):
    torch.cuda.set_device(1)
    found, x = [], torch.ones(1, device="cuda:1")

    def look():
        found.append(torch.cuda.current_device())
        try:
            found.append(torch.rand(1, device="cuda:1").item())
        except RuntimeError as error:
            found.append(str(error))

    def function(x):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return x + 1

    capture(function, x)
    assert found[0] == 0 and "outside graph capture" in found[1]
    look()
    assert found[2] == 1 and 0 <= found[3] < 1
    torch.cuda.set_device(0)


def test_a_failed_capture_leaves_torch_in_disorder(machine):
    machine.fail_captures(1)
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="previous error"):
        capture(lambda x: x + 1 + 1, x)
    with pytest.raises(RuntimeError, match="outside graph capture"):
        torch.rand(1, device="cuda")
    with pytest.raises(RuntimeError, match="captures_underway"):
        torch.cuda.empty_cache()


def test_tf32_rounds_where_it_is_switched_on():
    with simulated_cuda(tf32=True):
        x = torch.full((1, 1), 1 + 2**-12, device="cuda")
        assert (x @ x).item() > 1
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            assert (x @ x).item() == 1
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False


def test_nothing_is_left_behind():
    before = (torch.tensor, torch.Generator, torch.cuda.Stream, threading.Thread.run, torch.backends.cudnn.enabled)
    with simulated_cuda():
        assert torch.cuda.is_available()
    after = (torch.tensor, torch.Generator, torch.cuda.Stream, threading.Thread.run, torch.backends.cudnn.enabled)
    assert before == after and not torch.cuda.is_available() and "is_pinned" not in vars(torch.Tensor)
