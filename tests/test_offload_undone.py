"""Parts that are away on a simulated CUDA device while what has been made of them is taken back."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import request_for

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import OriginalsDiscardedWarning, TurboError
from chatterbox_turbo.passes import Pass, offload
from chatterbox_turbo.runtime.device import overlay
from chatterbox_turbo.upstream.parameters import Cast

QUIET = {"decoding": {"progress": "off"}}
AWAY = {"offload": {"mode": "sequential"}}


@pytest.fixture(autouse=True)
def _small_parts_leave_too(monkeypatch):
    monkeypatch.setattr(overlay, "SMALLEST", 256)


def config(originals, **more):
    precision = {"t3": "bfloat16", "flow": "bfloat16", "originals": originals}
    return {"fidelity": "lossy", **QUIET, "precision": precision, **more}


def devices(model):
    return {name: str(p.device) for part in (model.t3, model.s3gen, model.ve) for name, p in part.named_parameters()}


def values(model):
    return {name: p.detach().cpu().clone() for part in (model.t3, model.s3gen) for name, p in part.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def failing(function, at):
    """The function, whose call of that number finds no memory."""
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return function(*args)

    return call


def speak(simulated, model):
    simulated.machine.generators[0].manual_seed(5)
    torch.manual_seed(0)
    return model.generate(**request_for(model))


@pytest.mark.parametrize("originals", ["host", "discard"])
@pytest.mark.parametrize("family", ["english", "turbo"])
def test_weights_that_were_cast_come_home(simulated, originals, family):
    model = simulated.get(family)
    before, weights = devices(model), values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OriginalsDiscardedWarning)
        turbo.apply(model, config(originals, **AWAY))
        given = speak(simulated, model)
        turbo.apply(model, config(originals))
        assert devices(model) == before
        assert torch.equal(speak(simulated, model), given)
        turbo.apply(model, config(originals, **AWAY))
        assert torch.equal(speak(simulated, model), given)
        turbo.revert(model)
    assert devices(model) == before
    assert same(values(model), weights) == (originals == "host")
    assert torch.isfinite(speak(simulated, model)).all()


@pytest.mark.parametrize(
    "owner, name, at", [(Cast, "_before", 1), (Cast, "_before", 20), (overlay.DevicePart, "arrive", 3)]
)
@pytest.mark.parametrize("mode", ["sequential", "idle"])
def test_no_memory_to_come_home_or_to_restore_leaves_parts_where_they_were(
    simulated, monkeypatch, owner, name, at, mode
):
    model = simulated.get("turbo")
    before, weights = devices(model), values(model)
    turbo.apply(model, config("host", offload={"mode": mode}))
    given, away = speak(simulated, model), devices(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at))
        with pytest.raises(TurboError, match=r"out of memory.*Nothing has been undone.*revert again"):
            turbo.revert(model)
    assert devices(model) == away
    for _ in range(2):  # the first request fuses again what was taken apart
        assert torch.equal(speak(simulated, model), given)
        assert devices(model) == away
    assert model.turbo.renewals == ()
    turbo.revert(model)
    assert devices(model) == before and same(values(model), weights)


class Fails(Pass):
    name, summary = "fails", "an error at the end of apply"

    def apply(self, context):
        raise KeyError("last")


def test_an_apply_that_fails_with_parts_away_leaves_no_trace(simulated):
    model = simulated.get("turbo")
    before, weights = devices(model), values(model)
    with pytest.raises(KeyError):
        turbo.apply(model, config("discard", **AWAY), passes=[Fails()])
    assert devices(model) == before and same(values(model), weights)


def test_a_part_that_is_cast_while_it_is_away_comes_home(simulated):
    model = simulated.get("turbo")
    before, formats = devices(model), {name: p.dtype for name, p in model.t3.named_parameters()}
    turbo.apply(model, {**QUIET, **AWAY})
    speak(simulated, model)
    try:
        for parameter in model.t3.parameters():  # Module.half, without new objects as on the simulated machine
            parameter.data = parameter.data.half()
        turbo.revert(model)
        assert devices(model) == before
        assert {p.dtype for p in model.t3.parameters()} == {torch.float16}
    finally:
        turbo.revert(model)
        model.t3.float()
    assert formats == {name: p.dtype for name, p in model.t3.named_parameters()}


@pytest.mark.parametrize("mode", ["idle", "adaptive", "sequential"])
def test_parameters_are_ordinary_ones_though_parts_move_in_inference_mode(simulated, monkeypatch, voice, mode):
    """Values of inference mode are not taken for a part that leaves, and cannot be written to outside of it."""
    model, free = simulated.get("turbo"), [0.5]
    monkeypatch.setattr(offload, "free_memory", lambda device: (int(free[0] * 2**30), 2**30))
    turbo.apply(model, {**QUIET, "offload": {"mode": mode}})
    conds = model.conds
    with torch.inference_mode():
        for free[0] in (0.05, 0.9):  # adaptive: away, and home again
            model.prepare_conditionals(voice)
            speak(simulated, model)
            assert not [name for name, p in model.t3.named_parameters() if p.is_inference()]
    model.conds = conds
    turbo.revert(model)
    assert not [name for part in (model.t3, model.s3gen) for name, p in part.named_parameters() if p.is_inference()]
