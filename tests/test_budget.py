"""A memory budget: what is estimated against what is there, what is chosen, and what is refused in which words."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from cases import request_for, speak

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.budget import fitting, ladder, work
from chatterbox_turbo.budget.machine import Machine
from chatterbox_turbo.config.amounts import gigabytes, parse
from chatterbox_turbo.errors import BudgetError, InvalidConfigError, InvalidRequestError
from chatterbox_turbo.passes import ALL_PASSES
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.memory import readings
from chatterbox_turbo.runtime.s3gen.streaming import Windows
from chatterbox_turbo.runtime.t3 import step_choice
from chatterbox_turbo.upstream import sizes
from chatterbox_turbo.upstream.families import identify

PLAIN = {
    "decoding": {"progress": "off", "kernel": "torch", "max_new_tokens": 30},
    "conditioning": {"cache_bytes": 0},
    # tiny models: their layers are few, and this package's kernels need time to compile
    "quantization": {"strategy": "aggressive", "backend": "torch"},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What a product takes on this machine is not measured, and no library is loaded: estimates repeat."""
    monkeypatch.setattr(work, "onednn_is_faster", lambda threads: True)


@pytest.fixture(autouse=True)
def halves(monkeypatch):
    """Any processor is good at bf16."""
    from chatterbox_turbo.passes import precision
    from chatterbox_turbo.runtime.device import half_precision

    for module in (precision, half_precision):
        monkeypatch.setattr(module, "best_format", lambda device: ("bfloat16", "in this test"))


def fitted(model, size, **values):
    return turbo.inspect(model, {**PLAIN, "memory_budget": size, **values}).fit


def needed(model, **values):
    return {one.name: one.needed for one in everything(model, **values)}


def everything(model, **values):
    """All of the ladder: what a budget that nothing fits into has tried."""
    tried = []
    config = turbo.OptimizationConfig(**{**PLAIN, "memory_budget": 2**20, **values})
    list(fitting._plans(identify(model), config, Journal(), ALL_PASSES, ladder.LADDER, tried))
    return tried


@pytest.mark.parametrize(
    "written, size",
    [("2GB", 2 * 10**9), ("2 gb", 2 * 10**9), ("1536MiB", 1536 * 2**20), ("1.5GiB", 3 * 2**29), (2**30, 2**30),
     ("5000000", 5 * 10**6), (".5GB", 5 * 10**8)],
)  # fmt: skip
def test_amounts(written, size):
    assert parse(written).of(0) == size
    assert parse("50%").of(8 * 10**9) == 4 * 10**9


@pytest.mark.parametrize(
    "written, said",
    [
        ("2 GBB", "unknown unit"),
        ("-2GB", "not above zero"),
        (0, "not above zero"),
        ("0%", "not above zero"),
        ("150%", "more than there is"),
        ("much", "no amount of memory"),
        ("", "no amount of memory"),
        (True, "no amount of memory"),
        (1.5, "no amount of memory"),
        ("12", "less than any model needs"),
        (["2GB"], "no amount of memory"),
    ],
)
def test_what_is_no_amount(written, said):
    for key in ("vram_budget", "memory_budget"):
        with pytest.raises(InvalidConfigError, match=f"{key}.*{said}"):
            turbo.OptimizationConfig(**{key: written})


def test_contradictions(english, monkeypatch):
    with pytest.raises(InvalidConfigError, match="are both set"):
        turbo.OptimizationConfig(vram_budget="2GB", memory_budget="2GB")
    with pytest.raises(InvalidConfigError, match="neither vram_budget nor memory_budget"):
        turbo.OptimizationConfig(budget_slots=2)
    with pytest.raises(BudgetError, match=r"the model is on cpu.*Set memory_budget instead"):
        turbo.inspect(english, {"vram_budget": "2GB"})
    with pytest.raises(BudgetError, match=r"100TB.*this machine has"):
        fitted(english, "100TB")
    monkeypatch.setenv("CHATTERBOX_TURBO__MEMORY_BUDGET", "2 GBB")
    with pytest.raises(InvalidConfigError, match=r"^CHATTERBOX_TURBO__MEMORY_BUDGET: memory_budget: '2 GBB'"):
        turbo.inspect(english, "fast")


@pytest.mark.parametrize(
    "family, rung",
    [
        ("english", "as configured"),
        ("vc", "half precision"),
        ("english", "T3 in int8, the rest in half precision"),
        ("turbo", "T3 in four bits, the rest in half precision"),
    ],
)
def test_estimated_weights_are_those_that_are_there(models, family, rung):
    model = models(family)
    values = dict(ladder.LADDER)[rung]
    config = {**PLAIN, "fidelity": "lossy", "memory_budget": "20GB", **values}
    config["quantization"] = {**PLAIN["quantization"], **values.get("quantization", {})}
    try:
        turbo.apply(model, config)
        made, now = model.turbo.plan.fit.estimate, model.turbo.memory()
        assert made.parts == {name: entry["bytes"] for name, entry in now["parts"].items()}
        kept = sum(now["held"].get(name, {"bytes": 0})["bytes"] for name in ("original weights", "original layers"))
        # what is held is found through the journal, where a few small tensors are as well
        assert made.always["originals"] == pytest.approx(kept, rel=0.02, abs=320_000)
        assert (made.always["originals"] > 0) == (rung != "as configured")
    finally:
        turbo.revert(model)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("t3", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [1, 3])
def test_estimated_cache_is_the_one_that_is_there(models, monkeypatch, kernel, t3, slots):
    """Bytes of a position, in the format that the step keeps it in, of all rows of a batch; and how many positions."""
    by_torch = step_choice.Choice(dict.fromkeys(step_choice.ROWS, "torch"), "the fastest in this test")
    monkeypatch.setattr(step_choice, "fastest", lambda weights: by_torch)
    values = {"fidelity": "lossy", "precision": {"t3": t3}, "budget_slots": slots}
    for family, rows in (("english", 2), ("turbo", 1)):
        model = models(family)
        decoding = {**PLAIN["decoding"], "kernel": kernel, "max_new_tokens": 1000}
        turbo.apply(model, {**PLAIN, **values, "memory_budget": "20GB", "decoding": decoding})
        try:
            cache, made = model.turbo.token_model.backbone.cache, model.turbo.plan.fit.estimate
            cache.begin(rows * slots)
            cache.ensure(1)
            of_a_position = cache.nbytes / cache.capacity
            _, positions = sizes.of_token_model(model.t3).positions(1000)
            assert positions > 1000 and made.phases["t3"].cache == positions * of_a_position
        finally:
            turbo.revert(model)


def test_the_first_that_fits_is_taken(english):
    by_name = needed(english, fidelity="lossy")
    sizes = [size for size in by_name.values() if size]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 6
    for name, size in by_name.items():
        if size:
            fit = fitted(english, size, fidelity="lossy")
            assert (fit.chosen, fit.estimate.needed, fit.tried[-1].name) == (name, size, name)
    assert fitted(english, "20GB", fidelity="lossy").chosen == "as configured"


def test_the_ceiling_is_kept_and_the_refusal_says_what_would_do(english):
    by_name = needed(english)
    assert {name for name, size in by_name.items() if size} == {
        "as configured", "voice encoders away while idle", "each part in its phase only",
    }  # fmt: skip
    least = min(size for size in by_name.values() if size)
    with pytest.raises(BudgetError) as caught:
        fitted(english, least - 1)
    lossy = min(size for size in needed(english, fidelity="lossy").values() if size)
    assert caught.value.needed == {"numerical": least, "lossy": lossy}
    text = str(caught.value)
    assert f'fidelity = "lossy" allows {gigabytes(lossy)}' in text and "nothing fits into it" in text
    smallest = re.search(r"smallest budget that would do is (\w+)\.?", text)[1]
    assert fitted(english, smallest).estimate.needed <= parse(smallest).size
    with pytest.raises(BudgetError, match="nothing fits"):
        fitted(english, lossy - 1, fidelity="lossy")


def test_what_was_set_stays(english):
    fixed = {"fidelity": "lossy", "offload": {"mode": "off"}, "precision": {"t3": "float32"}}
    tried = {one.name: one for one in everything(english, **fixed)}
    assert tried["voice encoders away while idle"].obstacle == "offload.mode is off"
    assert tried["half precision"].obstacle == "precision.t3 is float32"
    least = min(one.needed for one in tried.values() if one.needed)
    with pytest.raises(BudgetError):
        fitted(english, least - 1, **fixed)
    # on a CPU half precision saves nothing while the other halves are kept for revert
    assert needed(english, fidelity="lossy", precision={"originals": "host"})["half precision"] is None


def test_length_and_slots_count(english):
    one = fitted(english, "20GB").estimate.needed
    longer = fitted(english, "20GB", decoding={**PLAIN["decoding"], "max_new_tokens": 60}).estimate
    more = fitted(english, "20GB", budget_slots=3).estimate
    assert one < longer.needed and one < more.needed
    assert more.phases["t3"].cache == 3 * fitted(english, "20GB").estimate.phases["t3"].cache


def test_a_budget_that_is_kept_by_offload_and_reported(models):
    """Applied, spoken with, reported side by side; a batch is held to what was planned."""
    model = models("turbo")
    try:
        size = needed(model)["voice encoders away while idle"]
        turbo.apply(model, {**PLAIN, "memory_budget": size, "memory": {"peaks": True}})
        assert model.turbo.config.offload.mode == "idle" and model.turbo.plan.step("offload").status == "on"
        speak(model)
        text, data = str(model.turbo.report()), model.turbo.report().to_dict()["budget"]
        assert "memory_budget" in text and re.search(r"\n  flow +\d+ +\d+\n", text)
        assert data["chosen"] == "voice encoders away while idle" and data["kind"] == "memory_budget"
        assert {"t3", "flow", "vocoder"} <= data["measured"].keys() <= {*data["estimate"]["phases"], "watermark"}
        assert 0.5 < data["estimate"]["needed"] / max(data["measured"].values()) < 2  # tiny: mostly libraries
        with pytest.raises(InvalidRequestError, match="slots is 2, but the budget was planned for 1"):
            model.turbo.batch([request_for(model)], slots=2)
        with pytest.raises(BudgetError, match="optimized already"):
            turbo.inspect(model, {"memory_budget": size})
        # from the weights as they were, not from those that are there now
        turbo.apply(model, {**PLAIN, "memory_budget": "20GB"})
        assert model.turbo.config.offload.mode == "off" and model.turbo.plan.fit.chosen == "as configured"
        before = model.turbo.plan
        with pytest.raises(BudgetError):
            turbo.apply(model, {**PLAIN, "memory_budget": "1MiB"})
        assert model.turbo.plan.running == before.running
    finally:
        turbo.revert(model)


def test_a_part_that_is_replaced_is_planned_anew(fresh):
    model = fresh("turbo")
    turbo.apply(model, {**PLAIN, "memory_budget": "20GB"})
    try:
        first = model.turbo.plan.fit
        model.ve = copy.deepcopy(model.ve)
        speak(model)
        assert model.turbo.renewals and model.turbo.plan.fit is not first
        assert model.turbo.plan.fit.estimate == first.estimate and model.turbo.plan.request.offload.mode == "off"
    finally:
        turbo.revert(model)


def test_auto_chooses_by_the_machine(english, monkeypatch):
    own = sum(fitting._resident(identify(english)).values())
    plan = turbo.inspect(english, {"preset": "auto", **PLAIN})
    assert plan.fit.kind == "auto" and plan.fit.chosen == "as configured" and "2 cores" not in str(plan.fit.notes)
    assert "auto, by the machine (cpu," in str(plan)
    sizes = needed(english)
    for free, chosen, short in (
        (sizes["as configured"], "as configured", False),
        (sizes["voice encoders away while idle"], "voice encoders away while idle", False),
        (sizes["voice encoders away while idle"] - 1, "voice encoders away while idle", True),
    ):
        monkeypatch.setattr(readings, "free", lambda device, free=free: (free - own, 8 * 2**30))
        plan = turbo.inspect(english, {"preset": "auto", **PLAIN})
        assert plan.fit.chosen == chosen and bool(plan.fit.notes) == short
        assert plan.config.fidelity == "numerical" and plan.step("precision").status == "off"
    assert "Recommended here: the preset cpu_small" in plan.fit.notes[0]
    monkeypatch.setattr(fitting, "estimate", lambda context: 1 / 0)
    assert turbo.inspect(english, {"preset": "auto", **PLAIN}).fit is None


def test_on_a_gpu(simulated, monkeypatch):
    """Weights are compared where they are."""
    model = simulated.get("vc")
    values = {"conditioning": {"cache_bytes": 0}, "fidelity": "lossy"}
    with pytest.raises(BudgetError, match=r"the model is on cuda:0.*Set vram_budget instead"):
        turbo.apply(model, {**values, "memory_budget": "2GB"})
    with pytest.raises(BudgetError, match=r"900GB.*cuda:0 has"):
        turbo.apply(model, {**values, "vram_budget": "900GB"})
    turbo.apply(model, {**values, "vram_budget": "25%"})
    made, now = model.turbo.plan.fit.estimate, model.turbo.memory()
    there = {name: sum(entry["by"].get("cuda:0", {}).values()) for name, entry in now["parts"].items()}
    assert made.parts == there and made.parts["watermarker"] == 0
    assert made.always["graph pools"] > 0 and made.always["originals"] == made.always["libraries"] == 0
    copies = sum(sum(entry["by"].get("cuda:0", {}).values()) for name, entry in now["held"].items() if name != "voice")
    assert 0.7 * copies < made.always["copies"] < 1.3 * copies
    assert str(model.turbo.report()).count("vram_budget") == 2
    turbo.revert(model)
    english = simulated.get("english")
    with pytest.raises(BudgetError, match="nothing fits"):
        turbo.apply(english, {"decoding": PLAIN["decoding"], "vram_budget": "1MiB"})
    config = turbo.OptimizationConfig(fidelity="lossy", vram_budget="1MiB", decoding=PLAIN["decoding"])
    tried = []
    list(fitting._plans(identify(english), config, Journal(), ALL_PASSES, ladder.LADDER, tried))
    sizes = {one.name: one.needed for one in tried}
    # a voice is encoded with all parts there, unless each is there in its phase only
    assert sizes["each part in its phase only"] < sizes["as configured"]
    assert Machine.of(torch.device("cuda:0")).preset()[0] == "vram_24gb"


def test_streams_keep_to_a_budget_and_the_others_wait():
    model = synthetic.build("english", "tiny", stop_after=40)
    windows = Windows(first_chunk=3, chunk=4, growth=1.0, longest_chunk=4)
    texts = ["One day.", "Is it two?", "The third of them."]

    def heard(streams):
        blocks, places = [], 0
        for stream in streams:
            blocks.append([next(stream)[0]])
            places = max(places, model.turbo.token_model.backbone.cache.keys.size(1))
        for its, stream in zip(blocks, streams, strict=True):
            its += [wav for wav, _ in stream]
        return places, [torch.cat(its, 1) for its in blocks]

    results = []
    for values in ({}, {"memory_budget": "8GB", "budget_slots": 1}, {"memory_budget": "8GB", "budget_slots": 2}):
        turbo.apply(model, {"decoding": {"progress": "off", "kernel": "torch"}, **values})
        results.append(heard([model.turbo.stream(text, seed=1, windows=windows) for text in texts]))
    (every, alone), (one, single), (two, pair) = results
    assert (every, one, two) == (4 * one, one, 2 * one) and one > 0
    for wav, *others in zip(alone, single, pair, strict=True):
        assert all(other.shape == wav.shape and torch.allclose(other, wav, atol=1e-3) for other in others)
