"""Parts that a user casts, before ``apply`` or after: as upstream speaks with them, and as the report says."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import speak

import chatterbox_turbo as turbo
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.device.half_precision import best_format

QUIET = {"decoding": {"progress": "off"}}
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64

# part, format, what it is to reach against upstream (dB) under "auto"; None: at least as near to fp32 as upstream is
ROWS = [
    # where the processor multiplies bf16 it rounds elsewhere than upstream: two of 13 tokens are others; 0 dB: all are
    ("english", "t3", BF16, 10 if best_format(torch.device("cpu"))[0] else 60),
    ("english", "t3", FP16, 60),
    ("english", "t3", FP64, 60),
    ("english", "s3gen.flow.decoder.estimator", BF16, None),
    ("english", "s3gen.flow.decoder.estimator", FP16, None),
    ("english", "s3gen.flow.decoder", BF16, None),
    ("english", "ve", BF16, 60),
    ("english", "s3gen.tokenizer", BF16, 60),
    ("turbo", "t3", BF16, 60),
    ("turbo", "s3gen.flow.decoder.estimator", BF16, None),
]
WORDS = {BF16: "bfloat16", FP16: "float16", FP64: "float64"}


def part_of(model, path):
    part = model
    for step in path.split("."):
        part = getattr(part, step)
    return part


def cast(model, path, dtype):
    """The part, and for T3 what it is conditioned on, as servers cast them."""
    part_of(model, path).to(dtype)
    if path == "t3":
        conds = copy.copy(model.conds)
        given = {
            k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in vars(conds.t3).items()
        }
        conds.t3 = type(conds.t3)(**given)
        model.conds = conds


def tensors(part):
    return {name: tensor for kind in (part.named_parameters, part.named_buffers) for name, tensor in kind()}


@pytest.fixture
def uncast(fresh):
    """``uncast(family, path)``: the module's model, that part as it was before this test; also afterwards."""
    before = {}

    def get(family, path):
        model = turbo.revert(fresh(family))
        now = tensors(part_of(model, path))
        if not before:
            before.update(
                asked=(family, path), voice=model.conds, tensors={n: t.detach().clone() for n, t in now.items()}
            )
        for name, tensor in now.items():
            tensor.data = before["tensors"][name].clone()
        model.conds = before["voice"]
        return model

    yield get
    if before:
        get(*before["asked"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("family, path, dtype, floor", ROWS)
def test_a_cast_part_speaks_as_upstream_does(uncast, family, path, dtype, floor):
    model = uncast(family, path)
    fp32 = speak(model)
    turbo.apply(model, {"preset": "exact", **QUIET})
    speak(model)
    cast(model, path, dtype)
    given = {("exact", "after"): speak(model)}
    turbo.revert(model)
    upstream = speak(model)
    for preset in ("exact", "auto"):
        turbo.apply(model, {"preset": preset, **QUIET})
        given[preset, "before"] = speak(model)
        turbo.revert(model)
    assert torch.equal(speak(model), upstream), "revert left something"
    model = uncast(family, path)
    assert torch.equal(speak(model), fp32), "not what it was before the cast"
    turbo.apply(model, QUIET)
    speak(model)
    cast(model, path, dtype)
    given["auto", "after"] = speak(model)
    report = {step.name: step.reason for step in model.turbo.plan.steps}
    for (preset, when), samples in given.items():
        assert samples.shape == upstream.shape, (preset, when)
        if preset == "exact":
            assert torch.equal(samples, upstream), when
        elif floor is not None:
            assert snr_db(samples, upstream) > floor, (when, snr_db(samples, upstream))
        else:
            # so small a model rounds in few places, and ours in others than upstream
            assert snr_db(samples, fp32) > snr_db(upstream, fp32) - 3.0, when
    if path == "t3":
        assert WORDS[dtype] in report["decoding"]
    elif "decoder" in path:
        assert WORDS[dtype] in report["flow"]


def test_the_report_knows_before_the_next_call(uncast):
    english = uncast("english", "s3gen.flow.decoder.estimator")
    turbo.apply(english, QUIET)
    speak(english)
    english.s3gen.flow.decoder.estimator.to(BF16)
    assert "weights have changed since" in str(english.turbo.report())
    speak(english)
    assert "bfloat16" in english.turbo.plan.step("flow").reason
    assert "weights have changed since" not in str(english.turbo.report())
