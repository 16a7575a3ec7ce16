"""Every family and preset on a simulated CUDA machine, against upstream on the same machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CASES, FAMILIES, SPEAKING, request_for

import chatterbox_turbo as turbo
from chatterbox_turbo.measure.fidelity import Sample, compare_samples, sample
from chatterbox_turbo.runtime.s3gen.graphed import GraphedNetwork
from chatterbox_turbo.upstream.families import identify

QUIET = {"decoding": {"progress": "off"}}
PROMISES = {"exact": "exact", "auto": "numerical", "fast": "lossy"}
FAST_DB = 15.0  # of tiny models in bf16
SEED = 3


@dataclass(frozen=True)
class Reference:
    """What upstream says, and the states in which it leaves the generators."""

    sample: Sample
    states: tuple[torch.Tensor, torch.Tensor]


_references: dict[Any, Reference] = {}


def states(machine, device) -> tuple[torch.Tensor, torch.Tensor]:
    return machine.generators[torch.device(device).index].get_state(), torch.get_rng_state()


def speak(simulated, model, device="cuda:0") -> Reference:
    spoken = sample(model, SEED, request_for(model))
    return Reference(spoken, states(simulated.machine, device))


def reference(simulated, family, device="cuda:0") -> Reference:
    """Upstream's, on this device whatever else is current: computed once."""
    if (family, device) not in _references:
        _references[family, device] = speak(simulated, simulated.get(family, device), device)
    return _references[family, device]


def check(simulated, family, promise, ours: Reference, device="cuda:0") -> float:
    """The promise is kept; for exact and numerical ones the generators are where upstream's leave them. Returns dB."""
    theirs, model = reference(simulated, family, device), simulated.get(family, device)
    comparison = compare_samples(model, ours.sample, theirs.sample)
    assert not comparison.broken(promise)
    if promise != "lossy":
        assert all(torch.equal(a, b) for a, b in zip(ours.states, theirs.states, strict=True))
    return comparison.snr_db


def runners(model) -> dict[str, Any]:
    """The graph runners that work for a model, by what they run."""
    engines = model.turbo._engines
    loop = engines.token_model and engines.token_model.loop
    found = {
        "t3": loop and loop._step and loop._step.runner,
        "flow": engines.flow and engines.flow.solver.runner,
        "vocoder": engines.vocoder and engines.vocoder.network.runner,
    }
    return {name: one for name, one in found.items() if one is not None}


@pytest.mark.parametrize("preset", PROMISES)
@pytest.mark.parametrize("family", FAMILIES)
def test_presets_keep_their_promise(simulated, family, preset, monkeypatch):
    monkeypatch.setattr(GraphedNetwork, "pays_after", 0)  # graphs of flow and vocoder from the first call on
    reference(simulated, family)
    model = turbo.apply(simulated.get(family), {"preset": preset, **QUIET})
    with simulated.machine.watching() as seen:
        ours = speak(simulated, model)
    decibels = check(simulated, family, PROMISES[preset], ours)
    assert ours.sample.wav.isfinite().all()
    tokens = [one.sample.tokens for one in (ours, reference(simulated, family))]
    if tokens[0] is None or torch.equal(*tokens):  # rounding to bf16 may change a token of so small a model
        assert decibels == math.inf if preset == "exact" else decibels > FAST_DB
    graphs = runners(model)
    assert not any(runner.fallbacks for runner in graphs.values())
    assert (seen.counts["captures"] > 0) == (preset != "exact") == (seen.counts["replays"] > 0)
    if preset == "auto":  # numbers that no replay may leave behind: the second call is the first one again
        again = speak(simulated, model)
        assert torch.equal(again.sample.wav, ours.sample.wav)


@pytest.mark.parametrize(
    ("family", "preset", "device", "current"),
    [
        ("english", "exact", "cuda:1", 0),
        ("english", "auto", "cuda:1", 0),
        ("turbo", "auto", "cuda:0", 1),
        ("multilingual", "auto", "cuda:0", 1),
        ("vc", "auto", "cuda:0", 1),
    ],
)
def test_another_device_is_current(simulated, family, preset, device, current):
    reference(simulated, family, device)
    torch.cuda.set_device(current)
    try:
        model = turbo.apply(simulated.get(family, device), {"preset": preset, **QUIET})
        with simulated.machine.watching() as seen:
            ours = speak(simulated, model, device)
        check(simulated, family, PROMISES[preset], ours, device)
        assert not seen.counts["between_devices"] and not seen.counts[f"kernels on cuda:{current}"]
        assert not any(runner.fallbacks for runner in runners(model).values())
        assert model.turbo.timings() and str(model.turbo.report())
    finally:
        torch.cuda.set_device(0)


ON_CUDA = [case for case in CASES if case.variant != "onednn"]  # which computes on CPUs


@pytest.mark.parametrize("case", ON_CUDA, ids=str)
def test_passes_alone(simulated, case):
    family = "turbo" if "turbo" in case.families else case.families[0]
    reference(simulated, family)
    model = turbo.apply(simulated.get(family), case.config)
    assert model.turbo.plan.step(case.name).status == "on", model.turbo.plan.step(case.name).reason
    check(simulated, family, case.promise, speak(simulated, model))


def test_max_speed_leaves_t3_in_half_precision(simulated):
    """Its kernels for four bits are a CPU's; making matrices plain for every product would be slower."""
    plan = turbo.inspect(simulated.get("turbo"), "max_speed")
    step = plan.step("quantization")
    assert step.status == "skipped" and "kernels run on CPUs" in step.reason
    assert plan.step("precision").status == plan.step("flow").status == "on"


def limited(model, tokens: int):
    """A function that decodes so many tokens of the tests' sentence, and nothing else."""
    calls, engine = [], model.turbo.token_model

    class Seen(Exception):
        pass

    def handler(*args, **kwargs):
        calls.append((args, kwargs))
        raise Seen

    with engine.calls.diverted(handler), pytest.raises(Seen):
        model.generate(**request_for(model))
    ((args, kwargs),) = calls
    name = "max_gen_len" if identify(model).family in ("turbo", "nano") else "max_new_tokens"
    return lambda: engine.speak(*args, **{**kwargs, name: tokens})


LAUNCHES = 5  # of kernels and graphs for a token: random numbers, a replay with its generator's two numbers


@pytest.mark.filterwarnings("ignore::chatterbox_turbo.errors.SpeechTruncatedWarning")
@pytest.mark.parametrize("family", SPEAKING)
def test_waits_and_launches_of_a_token(simulated, family):
    machine, model = simulated.machine, turbo.apply(simulated.get(family), {"preset": "auto", **QUIET})
    seen, spoken = {}, {}
    for tokens in (3, 7):  # before any model here stops by itself
        run = limited(model, tokens)
        run()  # captures
        torch.manual_seed(SEED)
        with machine.watching() as seen[tokens]:
            spoken[tokens] = run().numel()
        assert not seen[tokens].counts["captures"]
    assert spoken[7] - spoken[3] == 4  # upstream's Turbo speaks one more than it is asked for
    waits, launches = (
        (count(seen[7]) - count(seen[3])) / 4 for count in (lambda w: len(w.waits), lambda w: w.counts["launches"])
    )
    assert waits == 0, [str(one) for one in seen[7].waits]
    assert launches <= LAUNCHES, seen[7].by_op.most_common()


@pytest.mark.filterwarnings("ignore::chatterbox_turbo.errors.SpeechTruncatedWarning")
def test_graphs_after_the_cache_has_grown(simulated):
    model = simulated.get("english")
    reference(simulated, "english")
    turbo.apply(model, {"preset": "auto", **QUIET})
    torch.manual_seed(SEED)
    short = limited(model, 8)()
    cache = model.turbo.token_model.backbone.cache
    before = cache.capacity
    ours = speak(simulated, model)
    assert cache.capacity > before and ours.sample.tokens[0, :8].tolist() == short[0].tolist()
    check(simulated, "english", "numerical", ours)


@pytest.mark.parametrize("failures", [1, 1000])
def test_failed_captures_fall_back_and_are_reported(simulated, failures, caplog):
    model = simulated.get("english")
    reference(simulated, "english")
    turbo.apply(model, {"preset": "auto", **QUIET})
    simulated.machine.fail_captures(failures)
    ours = speak(simulated, model)
    check(simulated, "english", "numerical", ours)
    found = [reason for runner in runners(model).values() for reason in runner.fallbacks.values()]
    assert found and all("out of memory" in reason for reason in found)
    assert "runs without a CUDA graph: " in caplog.text
    torch.rand(1, device="cuda")  # generator and allocator are as they were
    torch.cuda.empty_cache()
