"""Every pass, over every family it applies to: parity, a negative control, revert, pairs, double apply."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, FAMILIES, ROWS, difference, only, request_for, snapshot, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.fidelity import compare
from chatterbox_turbo.passes import ALL_PASSES

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


def rows():
    return [pytest.param(case, family, id=f"{case}-{family}") for case, family in ROWS]


def pairs():
    for a, b in itertools.combinations(CASES, 2):
        for family in FAMILIES:
            if family in a.families and family in b.families:
                yield pytest.param(a, b, family, id=f"{a}+{b}-{family}")


def test_every_pass_is_in_the_table():
    tabled = {case.name for case in CASES} | {"precision"}  # precision needs CUDA: test_precision.py
    assert {p.name for p in ALL_PASSES} == tabled


@pytest.mark.parametrize("case, family", rows())
def test_pass_keeps_its_promise(models, case, family):
    model = models(family)
    for comparison in compare(model, case.config, [request_for(model)], seeds=(0, 7)):
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
    expected = speak(model)
    before = snapshot(model)
    turbo.apply(model, case.config)
    assert difference(before, snapshot(model)), "the snapshot does not see the pass at all"
    turbo.revert(model)
    assert difference(before, snapshot(model)) == []
    assert torch.equal(speak(model), expected)


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


@pytest.mark.parametrize("a, b, family", pairs())
def test_pairs_keep_the_weaker_promise(models, a, b, family):
    model = models(family)
    for comparison in compare(model, only(a, b), [request_for(model)], seeds=(3,)):
        assert comparison.broken("exact") == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_preset_equals_upstream(models, family):
    """Eight texts by three seeds, tokens and samples; voice conversion takes seeds only."""
    model = models(family)
    config = {"preset": "exact", "decoding": {"progress": "off"}}
    requests = [request_for(model, text) for text in (TEXTS if family != "vc" else TEXTS[:1])]
    comparisons = compare(model, config, requests, SEEDS)
    assert [c.broken("exact") for c in comparisons] == [""] * (len(requests) * len(SEEDS))


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
