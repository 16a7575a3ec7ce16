"""The stages of ``generate`` are upstream's: each has a line where it begins, and unknown code stays as it is."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from cases import FAMILIES, request_for, require, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError, UnavailablePassError
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.upstream import flow_inputs, stages
from chatterbox_turbo.upstream.families import identify

QUIET = {"decoding": {"progress": "off", "kernel": "torch"}}
ORDER = ("bind", "condition", "ask", "decode", "spoken", "frames", "samples", "mark")


@pytest.mark.parametrize("family", [*FAMILIES, "nano"])
def test_generate_goes_through_the_stages_to_the_bit(models, monkeypatch, family):
    require(family)
    model = models(family)
    expected = speak(model, 5)
    turbo.apply(model, {"preset": "exact", **QUIET})
    kind, seen = type(model.turbo._pipeline.stages), []
    for name in ORDER:
        original = getattr(kind, name)

        def watched(self, *args, _name=name, _original=original):
            seen.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(kind, name, watched)
    try:
        assert torch.equal(speak(model, 5), expected)
    finally:
        turbo.revert(model)
    assert [name for name in seen if name in ORDER] == list(ORDER)


@pytest.mark.parametrize("family", FAMILIES)
def test_flow_matching_is_given_what_upstream_gives_it(models, family):
    """Inputs, noise and cut of one utterance, against ``flow_inference`` with the same random numbers."""
    require(family)
    model = models(family)
    parts = identify(model)
    reference = dict(parts.voice if family == "vc" else parts.voice.gen)
    tokens = torch.randint(6561, (17,), generator=torch.Generator().manual_seed(0))
    steps = stages.stages(parts).steps()
    assert not flow_inputs.why_not(parts, Journal())
    torch.manual_seed(3)
    expected = stages.stages(parts).frames(tokens, dict(reference))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    inputs = flow_inputs.read(parts.s3gen, tokens, reference)
    noise = flow_inputs.draw(parts.s3gen, inputs)
    assert torch.equal(torch.get_rng_state(), after)
    frames = flow_inputs.utterance(inputs, flow_inputs.solve(parts.s3gen, inputs, noise, steps))
    assert frames.shape == expected.shape == (1, 80, 34)
    assert (frames - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(reference[name] is (parts.voice if family == "vc" else parts.voice.gen)[name] for name in reference)


def test_unknown_code_stays_upstreams_and_says_so(fresh):
    model = fresh("english")

    class Fork(type(model)):
        def generate(self, text, **options):
            return super().generate(text.upper(), **options)

    model.__class__ = Fork
    try:
        turbo.apply(model, QUIET)
        assert model.turbo._entry.speak is None
        assert "batches are spoken one by one" in str(model.turbo.report())
        assert model.turbo.plan.step("text").status == "skipped"
        torch.manual_seed(1)
        alone = model.generate("One.")
        waves = model.turbo.batch([{"text": "One.", "seed": 1}, {"text": "Two.", "seed": 2}])
        assert torch.equal(waves[0], alone) and not torch.equal(waves[0], waves[1])
        with pytest.raises(UnavailablePassError, match=r"cannot stream.*generate comes from"):
            model.turbo.stream("One.")
        results = dict(model.turbo.as_completed([{"text": "One.", "seed": 1}, {"text": 3}]))
        assert torch.equal(results[0], alone) and isinstance(results[1], Exception)
    finally:
        turbo.revert(model)
        model.__class__ = Fork.__bases__[0]


def test_a_patch_after_apply_is_noticed(fresh, monkeypatch):
    model = fresh("english")
    turbo.apply(model, QUIET)
    assert model.turbo._entry.speak is not None
    original = type(model).generate

    def generate(self, text, **options):
        return original(self, text, **options)

    monkeypatch.setattr(type(model), "generate", generate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate("One.")
    assert model.turbo._entry.speak is None
    monkeypatch.undo()
    model.generate("One.")
    assert model.turbo._entry.speak is not None
    turbo.revert(model)


def test_a_series_has_failures_in_their_places_and_leaves_the_model_free(english):
    turbo.apply(english, QUIET)
    items = ({"text": text, "seed": n} if text else {"text": "Two.", "temperature": -1}
             for n, text in enumerate(["One.", "", "Three.", "Four.", "Five."]))  # fmt: skip
    results, own = {}, english.conds
    for number, result in english.turbo.as_completed(items, slots=1):
        results[number] = result
        assert english.generate("Between.").numel()  # the model is free
    assert sorted(results) == [0, 1, 2, 3, 4] and english.conds is own
    assert isinstance(results[1], InvalidRequestError)
    torch.manual_seed(4)
    alone = english.generate("Five.")
    assert np.isclose(results[4], alone, atol=1e-3 * float(alone.abs().max())).all()
    with pytest.raises(InvalidRequestError, match="temperature is -1"):
        list(english.turbo.as_completed([{"text": "One.", "temperature": -1}], return_exceptions=False))
    given = english.turbo.batch([{"text": "One."}, "Two."], return_exceptions=True)
    assert torch.is_tensor(given[0]) and "Item 1 of the batch is 'Two.'" in str(given[1])
    work = english.turbo.as_completed([{"text": "One."}] * 9, slots=1)
    next(work)
    turbo.apply(english, QUIET)
    with pytest.raises(UnavailablePassError, match="has changed while its batch ran"):
        list(work)


def test_items_are_read_as_they_are_needed(english):
    turbo.apply(english, QUIET)
    read = []

    def items():
        for number in range(1000):
            read.append(number)
            yield {"text": "One.", "seed": number}

    work = english.turbo.as_completed(items(), slots=1)
    next(work)
    assert len(read) == 4
    work.close()


def test_without_a_voice_it_is_told(fresh):
    model = fresh("english")
    turbo.apply(model, QUIET)
    voice, model.conds = model.conds, None
    try:
        with pytest.raises(InvalidRequestError, match=r"no voice.*audio_prompt_path was not given"):
            model.generate(**request_for(model))
    finally:
        model.conds = voice
        turbo.revert(model)


def test_unknown_code_inside_flow_matching_is_left_to_it(fresh, monkeypatch):
    """Batches go through upstream's own functions then, one utterance after the other, and streams are refused."""
    model = fresh("english")
    flow = type(model.s3gen.flow)
    original, calls = flow.inference, []

    def inference(self, *args, **options):
        calls.append(1)
        return original(self, *args, **options)

    monkeypatch.setattr(flow, "inference", inference)
    turbo.apply(model, QUIET)
    try:
        waves = model.turbo.batch([{"text": "One.", "seed": 1}, {"text": "Two.", "seed": 2}])
        assert len(calls) == 2
        torch.manual_seed(2)
        assert torch.equal(model.generate("Two."), waves[1])
        with pytest.raises(UnavailablePassError, match="cannot stream"):
            model.turbo.stream("One.")
    finally:
        turbo.revert(model)
