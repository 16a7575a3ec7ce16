"""A layer that is wrapped, hooked or parametrized stays upstream's, with the reason, until it is plain again."""

from __future__ import annotations

import pytest
import torch
from alterations import ALTERATIONS, WRAPPERS, alter
from cases import speak

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import UnavailablePassError
from chatterbox_turbo.measure.fidelity import snr_db

QUIET = {"decoding": {"progress": "off"}}
FLOOR = 60  # dB, of what is promised as numerical

ALTERED = [
    *(("english", "t3.tfmr.layers.1.mlp.up_proj", how, "after") for how in (*ALTERATIONS, *WRAPPERS)),
    ("english", "t3.tfmr.layers.1.mlp.up_proj", "opaque", "before"),
    ("english", "t3.tfmr.layers.0.self_attn.q_proj", "adapter", "before"),
    ("english", "t3.speech_head", "softened", "after"),
    ("english", "s3gen.flow.encoder.encoders.0.feed_forward.w_2", "opaque", "before"),
    ("english", "s3gen.flow.encoder.encoders.0.feed_forward.w_2", "hook", "after"),
    ("english", "s3gen.flow.decoder.estimator.final_proj", "forward", "after"),
    ("turbo", "t3.tfmr.h.0.mlp.c_fc", "adapter", "after"),
    ("turbo", "s3gen.flow.decoder.estimator.mid_blocks.0.1.0.attn1.to_q", "parametrization", "after"),
]


@pytest.mark.parametrize("family, path, how, when", ALTERED)
def test_an_altered_layer_is_upstreams_until_it_is_plain_again(fresh, family, path, how, when):
    model = fresh(family)
    plain = speak(model)
    section, undo = ("decoding" if path.startswith("t3") else "flow"), None
    try:
        if when == "before":
            undo = alter(model, path, how)
        turbo.apply(model, QUIET)
        if when == "after":
            undo = alter(model, path, how)
        given = speak(model)
        reason = model.turbo.plan.step(section).reason
        undo()
        undo = None
        again = speak(model)
        assert path not in model.turbo.plan.step(section).reason, "plain again, and still upstream's"
        turbo.revert(model)
        undo = alter(model, path, how)
        expected = speak(model)
    finally:
        turbo.revert(model)
        if undo is not None:
            undo()
    assert path in reason
    assert expected.shape != plain.shape or snr_db(expected, plain) < 40, "the alteration makes no difference"
    assert given.shape == expected.shape and snr_db(given, expected) > FLOOR
    assert again.shape == plain.shape and snr_db(again, plain) > FLOOR


def test_half_precision_keeps_off_a_layer_that_is_altered(fresh):
    """Upstream's own code could not read weights in another format than its hidden states."""
    model = fresh("english")
    turbo.apply(model, {"preset": "fast", **QUIET})
    if model.turbo.plan.step("precision").status != "on":
        pytest.skip("half precision does not run here")
    undo = alter(model, "t3.tfmr.layers.1.mlp.up_proj", "hook")
    try:
        speak(model)
        assert model.t3.speech_head.weight.dtype == torch.float32
        assert "not t3" in model.turbo.plan.step("precision").reason
    finally:
        undo()
        turbo.revert(model)


def test_what_cannot_be_applied_again_says_what_to_do(fresh):
    """Only where the configuration demands what the new part cannot do."""
    model = fresh("english")
    turbo.apply(model, {**QUIET, "flow": {"enabled": True}})
    handle = model.s3gen.flow.decoder.estimator.mid_blocks[0].register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnavailablePassError, match=r"mid_blocks.*forward hook.*revert"):
            speak(model)
        assert model.turbo.plan.step("flow").status == "on"
        handle.remove()
        speak(model)
    finally:
        handle.remove()
        turbo.revert(model)
