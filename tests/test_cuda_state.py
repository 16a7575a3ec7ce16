"""Process-wide state on a simulated CUDA machine: TF32, devices, generators, graphs after a warm-up, memory."""

from __future__ import annotations

import gc
import json
import sys
import threading
import weakref

import pytest
import torch
from cases import CASES, TEXT, only, request_for, speak
from simulated_cuda import SimulatedTensor, execution, simulated_cuda, unsupported

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.cli import main
from chatterbox_turbo.measure.fidelity import compare, compare_samples, sample
from chatterbox_turbo.measure.gpu import examine
from chatterbox_turbo.runtime.device import captures
from chatterbox_turbo.runtime.device.captures import computing
from chatterbox_turbo.runtime.device.graphs import GraphRunner
from chatterbox_turbo.runtime.device.tf32 import full_precision, tf32
from chatterbox_turbo.runtime.device.timing import PhaseTimer
from chatterbox_turbo.runtime.t3.kv_cache import KVCache

pytestmark = pytest.mark.skipif(bool(unsupported()), reason=unsupported() or "supported")
QUIET = {"decoding": {"progress": "off"}}


def with_tf32(level: str | None = None) -> dict:
    warmup = {"warmup": {"level": level}} if level else {}
    return {**QUIET, "fidelity": "lossy", "precision": {"tf32": True, "t3": "float32", "flow": "float32"}, **warmup}


@pytest.fixture
def switch(monkeypatch):
    """Whether TF32 is allowed wherever matrices are multiplied for speech, as a set."""
    seen, real = set(), execution._on_cpu

    def looked(func, name, emulated):
        if name in ("mm", "addmm", "bmm", "baddbmm") and not trying_kernels():
            seen.add(torch.backends.cuda.matmul.allow_tf32)
        return real(func, name, emulated)

    def trying_kernels() -> bool:
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.endswith("step_choice.py"):
            frame = frame.f_back
        return frame is not None

    monkeypatch.setattr(execution, "_on_cpu", looked)
    return seen


def test_tf32_rules_warm_up_batches_and_calls_alike(simulated, switch):
    model = simulated.get("turbo")
    switch.clear()
    turbo.apply(model, with_tf32("light"))
    assert switch == {True}, "warm-up"
    switch.clear()
    model.turbo.batch([{"text": TEXT, "seed": 1}, {"text": "Yes.", "seed": 2}])
    assert switch == {True}, "batch"
    switch.clear()
    speak(model)
    assert switch == {True} and not torch.backends.cuda.matmul.allow_tf32


def test_a_graph_is_not_used_with_other_switches():
    """What is multiplied in TF32 when it is captured is so in every replay."""
    with simulated_cuda(tf32=True):
        run, x = GraphRunner(lambda key, x: x @ x, disable=False), torch.full((1, 1), 1 + 2**-12, device="cuda")
        precise = run("k", x).item()
        with tf32():
            assert run("k", x).item() == 1 < precise
        assert run("k", x).item() == precise
        torch.use_deterministic_algorithms(True)
        try:
            before = run.captured
            run("k", x)
            assert torch.cuda.CUDAGraph.machine.captures == 4 and run.captured == before
        finally:
            torch.use_deterministic_algorithms(False)


def test_full_precision_switches_tf32_off_for_a_while():
    assert torch.backends.cudnn.allow_tf32
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        with tf32():
            assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("level", ["light", "full"])
def test_after_a_warm_up_the_first_request_captures_nothing(simulated, level):
    model, machine = simulated.get("turbo"), simulated.machine
    turbo.apply(model, {**QUIET, "warmup": {"level": level}})
    assert machine.captures
    cache = model.turbo.token_model.backbone.cache
    capacity = cache.capacity
    with machine.watching() as seen:
        speak(model)
    assert seen.counts["replays"] and not seen.counts["captures"] and cache.capacity == capacity


def test_a_checkpoint_goes_to_the_device_that_is_current(simulated, saved):
    torch.cuda.set_device(1)
    try:
        with simulated.machine.watching() as seen, synthetic.architecture("tiny"):
            model = turbo.load("english", "cuda", folder=saved("english"), optimize=False)
    finally:
        torch.cuda.set_device(0)
    found = {
        str(tensor.device)
        for module in (model.t3, model.s3gen, model.ve)
        for tensor in (*module.parameters(), *module.buffers())
    }
    assert found == {"cuda:1"} and model.device == "cuda"
    assert not seen.counts["between_devices"] and not seen.counts["kernels on cuda:0"]


def test_half_precision_is_undone_where_the_model_is_now():
    with simulated_cuda(capability=(7, 0)):
        model = synthetic.build("english", "tiny", device="cuda:0")
        before = {name: value.cpu() for name, value in model.t3.state_dict().items()}
        turbo.apply(model, {**QUIET, "preset": "fast"})
        assert torch.float16 in {p.dtype for p in model.t3.parameters()}
        for tensor in (*model.t3.parameters(), *model.t3.buffers()):  # as ``Module.to`` does on a real device
            tensor.data = tensor.data.to("cuda:1")
        turbo.revert(model)
        assert {str(p.device) for p in model.t3.parameters()} == {"cuda:1"}
        assert all(torch.equal(value.cpu(), before[name]) for name, value in model.t3.state_dict().items())


def test_a_batch_leaves_every_generator_as_it_was(simulated):
    model, machine = simulated.get("turbo"), simulated.machine
    turbo.apply(model, QUIET)
    before = [generator.get_state() for generator in machine.generators]
    host = torch.get_rng_state()
    model.turbo.batch([{"text": TEXT, "seed": 1}, {"text": "Yes.", "seed": 2}])
    assert all(torch.equal(a.get_state(), b) for a, b in zip(machine.generators, before, strict=True))
    assert torch.equal(torch.get_rng_state(), host)


def test_times_can_be_read_while_another_thread_captures():
    """Waiting for a device with a stream in capture breaks the capture."""
    with simulated_cuda():
        timer, found = PhaseTimer(torch.device("cuda", 0)), []
        with timer.phase("one"):
            torch.ones(1, device="cuda")

        def function(key, x):
            if torch.cuda.is_current_stream_capturing():
                thread = threading.Thread(target=lambda: found.append(timer.seconds()))
                thread.start()
                thread.join()
            return x + 1

        run = GraphRunner(function, disable=False)
        run("k", torch.ones(1, device="cuda"))
        assert not run.fallbacks and list(found[0]) == ["one"]


def test_times_of_a_model_on_a_device_that_is_not_current():
    with simulated_cuda():
        timer = PhaseTimer(torch.device("cuda", 1))
        with timer.phase("one"):
            torch.cuda.set_device(1)
        torch.cuda.set_device(0)
        assert timer.seconds()["one"] > 0


def test_replays_on_another_stream_wait_for_those_before():
    """All graphs of a device share the workspace that products were captured with."""
    with simulated_cuda():
        first, second = (GraphRunner(lambda key, x: x @ x, disable=False) for _ in range(2))
        x, streams = torch.ones(1, 1, device="cuda"), [torch.cuda.Stream(), torch.cuda.Stream()]
        for run in (first, second):
            run("k", x)
        for run, stream in zip((first, second), streams, strict=True):
            with torch.cuda.stream(stream):
                run("k", x)
        assert any(other is streams[0] for _, other, _ in streams[1].behind)
        waits = len(streams[1].behind)
        with torch.cuda.stream(streams[1]):
            first("k", x)
        assert len(streams[1].behind) == waits  # on one stream everything is in order


def test_the_cache_of_a_large_batch_is_given_back():
    with simulated_cuda() as machine:
        cache = KVCache(2, 4, 8, torch.float32, torch.device("cuda", 0))
        cache.begin(2)
        cache.ensure(256)
        small = cache.nbytes
        kept = cache.keys.data_ptr()
        cache.begin(1)
        assert cache.keys.data_ptr() == kept  # too little to lose graphs for
        machine.memory = 20 * small
        cache.begin(32)
        assert cache.nbytes == 16 * small
        cache.begin(2)
        assert cache.nbytes == small and cache.capacity == 256


def test_a_backbone_that_is_replaced_gives_its_memory_back_at_once(simulated):
    model = simulated.get("turbo")
    turbo.apply(model, QUIET)
    speak(model)
    engine = model.turbo.token_model
    keys = weakref.ref(engine.backbone.cache.keys)
    graphs = len(simulated.machine.graphs)
    gc.collect()
    gc.disable()
    try:
        engine.prepare()
        assert keys() is None and len(simulated.machine.graphs) < graphs
    finally:
        gc.enable()


def test_a_capture_waits_for_the_calls_of_other_models_and_they_for_it():
    """While a graph is captured, random numbers of the default generator raise in every thread."""
    with simulated_cuda():
        x, order, inside, captured = torch.ones(1, device="cuda"), [], threading.Event(), threading.Event()

        def other():
            with computing(torch.device("cuda", 0)):
                inside.set()
                captured.wait(0.2)  # the capture does not begin before this call has ended
                torch.rand(1, device="cuda")
                order.append("drawn")

        def function(key, x):
            if torch.cuda.is_current_stream_capturing():
                order.append("captured")
            return x + 1

        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        with computing(torch.device("cuda", 0)):
            run = GraphRunner(function, disable=False)
            run("k", x)
        captured.set()
        thread.join()
        assert order == ["drawn", "captured"] and not run.fallbacks


def test_two_models_that_both_want_to_capture_do_not_wait_for_each_other():
    with simulated_cuda():
        runners = [GraphRunner(lambda key, x: x + 1, disable=False) for _ in range(2)]
        barrier, done = threading.Barrier(2), []

        def call(run):
            x = torch.ones(1, device="cuda:0")
            with computing(torch.device("cuda", 0)):
                barrier.wait(5)
                run("k", x)
                done.append(run.captured)

        threads = [threading.Thread(target=call, args=(run,), daemon=True) for run in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert done == [["k"], ["k"]]


def test_calls_of_a_model_are_what_a_capture_waits_for(simulated):
    """``generate``, voices and batches hold the other models' captures back; the models of one thread go on."""
    model, seen = simulated.get("turbo"), []
    turbo.apply(model, {"decoding": {"progress": lambda count, limit: seen.append(captures._gate.active())}})
    model.generate(**request_for(model))
    assert set(seen) == {1} and captures._gate.active() == 0
    assert isinstance(next(model.t3.parameters()), SimulatedTensor)


def test_convolutions_in_tf32_are_what_they_are_for_upstream_too(simulated):
    """``compare`` switches TF32 off for both; with torch's default both are equally far from fp32."""
    model, machine = simulated.get("turbo"), simulated.machine
    turbo.apply(model, QUIET)
    assert "in TF32 on this GPU" in str(model.turbo.report()) and model.turbo.report().to_dict()["notes"]
    turbo.revert(model)
    machine.tf32 = True
    try:
        (precise,) = compare(model, QUIET, [request_for(model)], seeds=(0,))
        theirs = sample(model, 0, request_for(model))
        with turbo.optimized(model, QUIET):
            ours = sample(model, 0, request_for(model))
        usual = compare_samples(model, ours, theirs)
    finally:
        machine.tf32 = False
    assert not precise.broken("numerical") and precise.snr_db > 60
    assert usual.snr_db < precise.snr_db - 10 and usual.snr_db > 40
    with full_precision():
        assert "TF32" not in str(turbo.apply(model, QUIET).turbo.report()).partition("note:")[2]


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_what_only_a_gpu_can_tell_is_printed(simulated, command, tmp_path, capsys):
    (tmp_path / "few.json").write_text(json.dumps(only(next(case for case in CASES if case.variant == "static"))))
    options = f"--model turbo --size tiny --device cuda --json {tmp_path}/out.json --config {tmp_path}/few.json"
    own = "--texts 1" if command == "verify" else "--runs 1 --synthetic --stop-after 12"
    arguments = [command, *options.split(), *own.split()]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "out.json").read_text())["gpu"]
    assert found["gpu"]["name"] == "Simulated" and found["gpu"]["capability"] == "9.0"
    assert found["optimized"]["first"]["captures"] > 0 == found["optimized"]["again"]["captures"]
    assert found["optimized"]["again"]["replays"] >= found["optimized"]["tokens"] - 1
    assert found["upstream"]["tokens_per_second"] > 0 < found["optimized"]["tokens_per_second"]
    assert sum(found["optimized"]["waits"].values()) < sum(found["upstream"]["waits"].values())
    assert any(place.startswith("chatterbox/") for place in found["upstream"]["waits"])
    for wanted in ("turbo on a GPU: name Simulated", "captured", "replayed", "tokens/s", "waits for the device", "dB"):
        assert wanted in said, said


def test_graphs_that_failed_are_in_the_findings(simulated):
    model = simulated.get("turbo")
    simulated.machine.fail_captures(1)
    found = examine(model, QUIET, request_for(model))
    assert found.optimized.first.failures and "out of memory" in "\n".join(found.lines())
