"""Every pass, over every family it applies to: parity, a negative control, revert, faults, pairs, double apply."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    FAMILIES,
    NO_ANALYZER,
    ROWS,
    Case,
    compare_with_kept,
    has_analyzer,
    only,
    request_for,
    speak,
    upstreams,
    weakest,
)
from faults import Injected, faults_around
from snapshots import difference, snapshot, voice_kinds

import chatterbox_turbo as turbo
from chatterbox_turbo.config import resolve
from chatterbox_turbo.measure.fidelity import compare
from chatterbox_turbo.passes import ALL_PASSES, Context
from chatterbox_turbo.plan import build_plan, carry_out
from chatterbox_turbo.upstream.families import identify

# Passes that cannot run on a CPU, or alone, and the file that tests each.
ELSEWHERE = {
    "precision": "test_precision.py",
    "attention": "test_attention.py",
    "quantization": "test_quantization.py",
}
# Off, all of them: what is compared is a pass from outside alone.
NOTHING = only()
FAULTS = {1: 9, 3: 6, 4: 5}  # places by the number of a pass's families, which have different ones: each costs an apply

TEXTS = (
    "Yes.",
    "The quick brown fox.",
    "Is it raining? It is!",
    "One, two, three; four... five.",
    "She said: “nothing — at all”.",
    "numbers like 1984 and 3.14 stay as they are",
    "A somewhat longer sentence, so that the text takes more positions than the others do in this table.",
    "Ångström, naïve, coöperate.",
)
SEEDS = (0, 1, 1234)


# families whose recordings upstream itself refuses: its norm_loudness gives double precision under NumPy 2
UNENCODED = {"turbo"} if int(np.__version__.split(".")[0]) >= 2 else set()


def rows():
    return [pytest.param(case, family, id=f"{case}-{family}") for case, family in ROWS]


def pairs():
    """Two passes in one family that has both, the families in turn: a pass alone is looked at in each (``rows``)."""
    number = 0
    for a, b in itertools.combinations(CASES, 2):
        both = [family for family in FAMILIES if family in a.families and family in b.families]
        if both and a.name != b.name:
            yield pytest.param(a, b, both[number % len(both)], id=f"{a}+{b}-{both[number % len(both)]}")
            number += 1


@pytest.fixture(autouse=True)
def _installed(request):
    """Rows that need what the installed release does not have, or cannot do, are skipped."""
    row = getattr(request.node, "callspec", None)
    given = row.params.values() if row else ()
    names = {getattr(one, "name", one) for one in given if isinstance(one, str | Case)}
    if "alignment" in names and not has_analyzer():
        pytest.skip(NO_ANALYZER)
    if "warmup" in names and names & UNENCODED and "conditioning" not in names:
        pytest.skip("upstream cannot encode a recording")


@pytest.fixture
def own_voice(models):
    """``own_voice(family)``: the session's model, which gets the voice back that it had."""
    kept = []

    def get(family):
        model = models(family)
        attribute = "ref_dict" if family == "vc" else "conds"
        kept.append((model, attribute, getattr(model, attribute)))
        return model

    yield get
    for model, attribute, voice in kept:
        turbo.revert(model)
        setattr(model, attribute, voice)


@pytest.fixture(scope="module")
def upstreams_kinds():
    """Kinds of the voice's tensors by family, as upstream's ``generate`` leaves them."""
    return {}


class InferenceMode(turbo.Pass):
    """Right samples of the wrong kind, as a pass that wraps ``generate`` in inference mode returns them."""

    name = "inference_mode"

    def apply(self, context):
        @contextmanager
        def scope(call):
            with torch.inference_mode():
                yield

        context.scopes.append(scope)
        return ""


def prepare_and_speak(model, family, voice):
    speak(model, **{"target_voice_path" if family == "vc" else "audio_prompt_path": voice})


def test_every_pass_is_in_the_table():
    assert {p.name for p in ALL_PASSES} == {case.name for case in CASES} | set(ELSEWHERE)
    assert all((Path(__file__).parent / file).exists() for file in ELSEWHERE.values())
    assert len({str(case) for case in CASES}) == len(CASES), "two rows have one id: give them a variant"


@pytest.mark.each_family
@pytest.mark.parametrize("case, family", rows())
def test_pass_keeps_its_promise(models, case, family):
    model = models(family)
    for comparison in compare_with_kept(model, case.config, seeds=(0, 7)):
        assert comparison.broken(case.promise) == ""


@pytest.mark.parametrize("case, family", rows())
def test_pass_does_something(models, case, family):
    model = models(family)
    without = case.observe(model, lambda: None, lambda: speak(model))
    try:
        with_pass = case.observe(model, lambda: turbo.apply(model, case.config), lambda: speak(model))
    finally:
        turbo.revert(model)
    assert with_pass != without


@pytest.mark.parametrize("case, family", rows())
def test_revert_leaves_no_trace(models, case, family):
    model = models(family)
    before = snapshot(model)
    turbo.apply(model, case.config)
    turbo.revert(model)
    assert difference(before, snapshot(model)) == []
    assert torch.equal(speak(model), upstreams(model, 0, request_for(model)).wav)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case, family", rows())
def test_the_snapshot_sees_what_a_pass_writes(models, case, family):
    """The pass alone, without entry points, timers and handle, which differ in any case."""
    model = models(family)
    before = snapshot(model)
    context = Context(identify(model), resolve(case.config))
    carry_out(build_plan(context, ALL_PASSES), context)
    try:
        assert case.name in context.applied
        seen, writes = difference(before, snapshot(model)), list(context.journal)
    finally:
        context.journal.undo()
    assert bool(seen) == bool(writes), "the snapshot misses what is in the journal, or the journal what was done"
    assert difference(before, snapshot(model)) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("case, family", rows())
def test_a_failure_in_any_write_of_a_pass_leaves_no_trace(models, monkeypatch, case, family):
    model = models(family)
    before, faults = snapshot(model), faults_around(monkeypatch, case.name)
    turbo.apply(model, case.config)
    turbo.revert(model)
    places, number, count = faults.passed, case.families.index(family), FAULTS[len(case.families)]
    between = [(step + number / len(case.families)) / (count - 1) for step in range(count - 1)]
    for place in sorted({1, places} | {1 + round(share * (places - 1)) for share in between}):
        faults.arm(place)
        with pytest.raises(Injected):
            turbo.apply(model, case.config)
        assert difference(before, snapshot(model)) == [], f"after a fault at place {place} of {places}"


@pytest.mark.parametrize("case, family", rows())
def test_the_voice_that_generate_leaves_is_of_upstreams_kind(own_voice, upstreams_kinds, voice, case, family):
    if family in UNENCODED:
        pytest.skip("upstream cannot encode a recording")
    model = own_voice(family)
    if family not in upstreams_kinds:
        prepare_and_speak(model, family, voice)
        upstreams_kinds[family] = voice_kinds(model)
    with turbo.optimized(model, case.config):
        prepare_and_speak(model, family, voice)
    expected = dict(upstreams_kinds[family])
    if case.name == "flow":  # upstream's solver turns the ids of the voice into fractions in place
        expected |= {path: "int64 on cpu" for path in expected if "prompt_token" in path.rpartition(".")[2]}
    if case.name == "conditioning":  # upstream's embedding keeps the speaker encoder's autograd graph alive
        assert any(kind.endswith(" with gradients") for kind in expected.values())
        expected = {path: kind.removesuffix(" with gradients") for path, kind in expected.items()}
    assert voice_kinds(model) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_the_wrong_kind_break_the_promise(models, family):
    model = models(family)
    (comparison,) = compare(model, NOTHING, [request_for(model)], seeds=(0,), passes=[InferenceMode()])
    assert comparison.snr_db == float("inf")
    assert "an inference tensor, upstream's float32 on cpu" in comparison.broken("exact")
    assert comparison.broken("lossy") == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_voice_of_the_wrong_kind_is_seen(own_voice, voice, family):
    model = own_voice(family)
    prepare_and_speak(model, family, voice)
    kinds = voice_kinds(model)
    with turbo.optimized(model, NOTHING, passes=[InferenceMode()]):
        before = snapshot(model)
        prepare_and_speak(model, family, voice)
    assert voice_kinds(model) != kinds
    assert any(path.startswith("/voice") for path in difference(before, snapshot(model)))


def test_the_snapshot_sees_each_way_in_which_a_weight_can_differ(english):
    weight = english.t3.speech_head.weight
    before, original, other = snapshot(english), weight.data, torch.empty(2, *weight.shape)
    other[0] = original
    changes = {
        "content": original + 1e-3,
        "format": original.double(),
        "layout": original.t().contiguous().t(),
        "shared storage": other[0],
    }
    try:
        for change, data in changes.items():
            weight.data = data
            assert difference(before, snapshot(english)), change
        weight.data = original.clone()
        assert difference(before, snapshot(english)) == []
    finally:
        weight.data = original


@pytest.mark.parametrize("family", FAMILIES)
def test_speaking_leaves_no_trace_either(models, family):
    """With the exact preset; upstream's own token loop would add a submodule, hooks and switches."""
    model = models(family)
    speak(model)
    before = snapshot(model)
    with turbo.optimized(model, {"preset": "exact", "decoding": {"progress": "off"}}):
        for seed in range(2):
            speak(model, seed)
    assert difference(before, snapshot(model)) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("a, b, family", list(pairs()))
def test_pairs_keep_the_weaker_promise(models, a, b, family):
    model = models(family)
    (comparison,) = compare_with_kept(model, only(a, b), seeds=(7,))
    assert comparison.broken(weakest(a, b)) == ""
    assert not hasattr(model, "turbo")


@pytest.mark.each_family
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_preset_equals_upstream(models, family):
    """Eight texts by one seed and one by three, tokens and samples; voice conversion takes seeds only."""
    model = models(family)
    config = {"preset": "exact", "decoding": {"progress": "off"}}
    requests = [request_for(model, text) for text in (TEXTS if family != "vc" else TEXTS[:1])]
    comparisons = compare(model, config, requests, SEEDS[:1]) + compare(model, config, requests[:1], SEEDS[1:])
    assert [c.broken("exact") for c in comparisons] == [""] * (len(requests) + len(SEEDS) - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_applying_again_replaces(models, family):
    model = models(family)
    before = snapshot(model)
    turbo.apply(model, "exact")
    first = model.turbo
    turbo.apply(model, {"decoding": {"enabled": False}, "watermark": {"detect": True}})
    assert model.turbo is not first
    assert model.turbo.plan.step("decoding").status == "off"
    assert model.turbo.config.watermark.detect
    turbo.revert(model)
    assert difference(before, snapshot(model)) == []
