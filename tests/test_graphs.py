"""Graphs: one set of rules with and without CUDA, and a way out of every failed capture; compilation as an option."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

import pytest
import torch

from chatterbox_turbo.runtime.device.compilation import compiled
from chatterbox_turbo.runtime.device.graphs import GraphCallError, GraphRunner

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def double(key, x):
    return x * 2


def runner(device, function=double, **options) -> GraphRunner:
    return GraphRunner(function, disable=device == "cpu", **options)


def vector(*values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_call_and_every_later_one_give_the_value_of_their_inputs(device):
    run = runner(device, lambda key, x, y: (x[:key] + y[:key], x * y))
    for key in (2, 3, 2):
        for scale in (1.0, 10.0):
            x = torch.arange(4.0, device=device) * scale
            total, product = run(key, x, x + 1)
            assert total.tolist() == (2 * x + 1)[:key].tolist()
            assert product.tolist() == (x * (x + 1)).tolist()
    assert run.captured == [3, 2] and not run.fallbacks


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_writes_to_the_position_that_it_is_given(device):
    cache = torch.zeros(8, device=device)

    def step(key, x, position):
        cache.index_copy_(0, position, x)
        return cache[:key].sum()

    run = runner(device, step)
    for index in range(6):
        total = run(4 if index < 4 else 8, vector(index + 1, device=device), torch.tensor([index], device=device))
        assert total.item() == sum(range(1, index + 2))
    assert cache.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(2), torch.zeros(3)), r"Input 1 of key 'k' is \(3,\), torch.float32, cpu.*Use another key"),
        ((torch.zeros(2), torch.zeros(2).half()), r"Input 1 of key 'k' .*float16.*first call it was .*float32"),
        ((torch.zeros(2),), "first called with 2 inputs, now with 1"),
        ((torch.zeros(2), 3.0), "Input 1 is float, not a tensor.*tensor on the graph's device"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), "Input 1 is on meta, input 0 on cpu.*Move it to cpu"),
        ((), "at least one input tensor"),
    ],
)
def test_other_inputs_are_refused_by_index_and_the_next_call_works(inputs, message):
    run = runner("cpu", lambda key, x, y: x + y)
    run("k", torch.ones(2), torch.ones(2))
    with pytest.raises(GraphCallError, match=message):
        run("k", *inputs)
    assert run("k", torch.ones(2), torch.ones(2)).tolist() == [2, 2]


def test_other_mistakes_are_refused():
    with pytest.raises(GraphCallError, match=r"on CUDA only, and input 0 is on cpu\. Pass disable=True"):
        GraphRunner(double, disable=False)("k", torch.ones(1))
    with pytest.raises(GraphCallError, match="Output 1 is int, not a tensor"):
        runner("cpu", lambda key, x: (x, 3))("k", torch.ones(1))
    for wrong in ({"max_graphs": 0}, {"warmup": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            runner("cpu", **wrong)


@pytest.mark.parametrize("device", DEVICES)
def test_the_least_recently_used_graph_goes_first(device):
    run = runner(device, max_graphs=2)
    for key in ("a", "b", "a", "c"):
        run(key, vector(1, device=device))
    assert run.captured == ["a", "c"]
    alone = runner(device, max_graphs=1)  # the memory pool is empty between two captures
    assert [alone(key, vector(1, device=device)).item() for key in "aba"] == [2, 2, 2]
    assert alone.captured == ["a"] and not alone.fallbacks


@pytest.mark.parametrize("device", DEVICES)
def test_moved_weights_drop_all_graphs(device):
    state = {"weight": vector(2, device=device)}
    read = lambda key, x: x * state["weight"]  # noqa: E731
    run = runner(device, read, addresses=lambda: (state["weight"].data_ptr(), state["weight"].dtype))
    stale = runner(device, read)
    x = vector(3, device=device)
    for each in (run, stale):
        each("a", x), each("b", x)
    old, state["weight"] = state["weight"], vector(5, device=device)  # the old one lives: no address is reused
    assert run("a", x).item() == 15 and run.captured == ["a"]
    assert stale("a", x).item() == (15 if device == "cpu" else 6)  # what the fingerprint is for
    state["weight"], x = old.double(), x.double()
    assert run("a", x).dtype == torch.float64  # other inputs than at the first call: it is forgotten too


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [True, False])
def test_surrounding_modes_neither_matter_nor_get_in(device, first):
    weight = torch.nn.Parameter(torch.eye(2, device=device))
    run = runner(device, lambda key, x: x @ weight)
    for inference in (first, not first, first):
        with torch.inference_mode(inference), torch.autocast(device, torch.bfloat16):
            x = torch.full((2, 2), 1.001, device=device)
            assert (x @ weight).dtype == torch.bfloat16
            y = run("k", x)
            assert torch.is_inference_mode_enabled() == inference
        assert y.dtype == torch.float32 and torch.equal(y, x) and not y.requires_grad and not y.is_inference()


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_function_is_raised_and_leaves_nothing_behind(device):
    state = {"broken": True}

    def fragile(key, x):
        if state["broken"]:
            raise KeyError("genuine")
        return x + 1

    run = runner(device, fragile)
    with pytest.raises(KeyError, match="genuine"):
        run("k", torch.zeros(3, device=device))
    assert not run.captured and not run.fallbacks
    state["broken"] = False
    assert run("k", torch.zeros(2, device=device)).tolist() == [1, 1]  # the shape of the failed call does not count


@pytest.mark.parametrize("device", DEVICES)
def test_reset_frees_buffers_and_a_finalizer_does_not_keep_the_model(device):
    model = torch.nn.Linear(512, 1, device=device)
    run = runner(device, lambda key, x, held=model: held(x))
    allocated = torch.cuda.memory_allocated if device == "cuda" else lambda: 0
    run("k", torch.zeros(2, 512, device=device))  # cuBLAS keeps its workspace from here on
    before = allocated()
    run("large", torch.zeros(1 << 15, 512, device=device))
    assert device == "cpu" or allocated() - before >= 64 << 20
    run.reset()
    assert run.captured == [] and allocated() <= before
    assert run("k", torch.zeros(1, 512, device=device)).shape == (1, 1)
    finalizer, died = weakref.finalize(model, run.reset), weakref.ref(model)
    del model, run
    gc.collect()
    assert died() is None and not finalizer.alive


@pytest.mark.gpu
def test_a_capture_that_cannot_be_runs_eagerly_and_harms_nobody():
    def syncs(key, x):
        return x + x.sum().item() if key == "sync" else x + 1

    run, x = runner("cuda", syncs), torch.ones(2, device="cuda")
    stream = torch.cuda.current_stream()
    assert run("fine", x).tolist() == [2, 2]
    assert [run("sync", x * scale).tolist() for scale in (1, 2)] == [[3, 3], [6, 6]]
    assert run.captured == ["fine"] and "captur" in run.fallbacks["sync"]
    assert torch.cuda.current_stream() == stream
    torch.rand(2, device="cuda")  # a generator that stayed in capture mode raises
    torch.cuda.empty_cache()  # an allocator that stayed so asserts
    assert run("fine", x).tolist() == [2, 2] and run("new", x).tolist() == [2, 2]
    assert run.captured == ["fine", "new"]


@pytest.mark.gpu
def test_out_of_memory_while_capturing_falls_back():
    def hungry(key, x):
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return x + 1

    run = runner("cuda", hungry)
    assert run("k", torch.ones(1, device="cuda")).item() == 2
    assert "OutOfMemory" in run.fallbacks["k"] and run.captured == []
    with pytest.raises(torch.OutOfMemoryError):  # without a graph just as much
        runner("cuda", lambda key, x: torch.empty(1 << 50, dtype=torch.uint8, device="cuda"))("k", torch.ones(1).cuda())


@pytest.mark.gpu
def test_any_thread_may_call_and_others_may_empty_the_cache_meanwhile():
    run, results, done = runner("cuda"), [], threading.Event()

    def empty():
        while not done.is_set():
            with suppress(RuntimeError):  # torch refuses it while a capture is under way
                torch.cuda.empty_cache()

    def call(key):
        results.append(run(key, torch.full((2,), float(key), device="cuda")).tolist())

    other = threading.Thread(target=empty)
    other.start()
    for key in (1, 2, 1, 3):
        thread = threading.Thread(target=call, args=(key,))
        thread.start()
        thread.join()
    done.set()
    other.join()
    assert results == [[2, 2], [4, 4], [2, 2], [6, 6]] and not run.fallbacks


def script(code: str, **environment: str) -> str:
    code = "import torch\nfrom chatterbox_turbo.runtime.device.compilation import compiled\n" + code
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.exhaustive
def test_compiles_where_there_is_a_compiler():
    code = "f, reason = compiled(lambda x: torch.sin(x) + 1, device='cpu')\nx = torch.ones(8)\n"
    assert (
        script(code + "print(torch.allclose(f(x), torch.sin(x) + 1), repr(reason), repr(f.reason))") == "True '' ''\n"
    )


def test_without_a_compiler_the_plain_function_stays_and_the_reason_is_known(tmp_path):
    code = "p = lambda x: x + 1\nf, reason = compiled(p, device='cpu')\nprint(f is p, f(torch.ones(1)).item(), reason)"
    output = script(code, PATH="/nonexistent", CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert output.startswith("True 2.0 no C++ compiler: InvalidCxxCompiler: No working C++ compiler")


def test_a_compiler_that_fails_at_the_first_call_gives_way_and_errors_of_the_function_do_not():
    def failing(graph, inputs):
        raise AssertionError("no code for this machine")

    f, reason = compiled(lambda x: torch.cos(x) + 1, backend=failing)
    assert not reason and [f(torch.zeros(2)).tolist() for _ in range(2)] == [[2, 2], [2, 2]]
    assert "no code for this machine" in f.reason

    def multiply(x):
        if x.shape[0] > 3:
            raise KeyError("genuine")
        return x @ torch.ones(2, 2)

    f, _ = compiled(multiply, backend="eager")
    for wrong, error in ((torch.ones(3), RuntimeError), (torch.ones(4), KeyError)):
        with pytest.raises(error):
            f(wrong)
    assert f(torch.ones(2)).tolist() == [2, 2] and f.reason == ""
