"""Autocast on request: it reaches T3's steps and the flow estimator's, nothing that is kept, and stays nowhere."""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import TEXT, request_for, speak
from recordings import differences, encode, voice_of
from snapshots import difference, snapshot

import chatterbox_turbo as turbo
from chatterbox_turbo.config.presets import PRESETS
from chatterbox_turbo.errors import InvalidConfigError, UnavailablePassError
from chatterbox_turbo.measure.divergence import token_divergence
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.device.autocasting import why_no_autocast

QUIET = {"progress": "off"}
STATIC, UPSTREAM = {**QUIET, "kernel": "torch"}, {**QUIET, "backbone": "upstream"}


def config(dtype="bfloat16", decoding=STATIC, **sections):
    return {"fidelity": "lossy", "decoding": decoding, "precision": {"autocast": dtype}, **sections}


def plainly(decoding=STATIC):
    return {"decoding": decoding}


@pytest.mark.parametrize(
    "family, decoding", [("english", STATIC), ("english", UPSTREAM), ("multilingual", STATIC), ("turbo", STATIC)]
)
def test_tokens_diverge_from_fp32_a_little(models, family, decoding):
    model = models(family)
    try:
        found = token_divergence(model, config(decoding=decoding), request_for(model))
    finally:
        turbo.revert(model)
    assert 1e-9 < found.mean < 1e-2 and found.agreement > 0.8 and found.steps > 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mel_frames_differ_a_little_and_the_report_says_for_which_parts(kept, dtype):
    model = kept("vc")
    turbo.apply(model, plainly())
    expected = speak(model)
    turbo.apply(model, config(dtype))
    samples = speak(model)
    assert samples.dtype == torch.float32 and 15 < snr_db(samples, expected) < 80
    reason = model.turbo.plan.step("precision").reason
    assert f"flow estimator under autocast to {dtype}" in reason and "not autocast of T3: the model has no T3" in reason


@pytest.mark.parametrize("decoding", [STATIC, UPSTREAM])
def test_nothing_of_it_is_kept(kept, voice, decoding):
    model = turbo.revert(kept("english"))
    before = snapshot(model)
    turbo.apply(model, plainly(decoding))
    encode(model, voice)
    expected, held = speak(model), voice_of(model)
    turbo.apply(model, config(decoding=decoding))
    torch.manual_seed(0)
    inside = model.generate(TEXT, audio_prompt_path=voice)  # encodes the voice in the call
    assert not torch.equal(inside, expected) and not differences(voice_of(model), held)
    assert not torch.is_autocast_enabled("cpu")
    turbo.apply(model, plainly(decoding))
    encode(model, voice)
    assert torch.equal(speak(model), expected)
    turbo.revert(model)
    assert [path for path in difference(before, snapshot(model)) if "voice" not in path and "conds" not in path] == []


@pytest.mark.parametrize("surrounded", [True, False])
def test_casts_are_forgotten_also_in_a_servers_autocast(fresh, surrounded):
    """There, torch itself remembers them until the server leaves its autocast, and reads them instead of weights."""
    model = fresh("english")
    turbo.apply(model, config(decoding=UPSTREAM))
    head = model.t3.speech_head
    kept = head.weight.detach().clone()
    x = torch.ones(1, head.in_features)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=surrounded):
            speak(model)
            head.weight.data.zero_()
            assert not F.linear(x, head.weight).any()
            if surrounded:  # what is to be forgotten, and how it would show
                F.linear(x, head.weight)
                head.weight.data.copy_(kept)
                assert not F.linear(x, head.weight).any()
    finally:
        head.weight.data.copy_(kept)
        turbo.revert(model)


def test_a_batch_is_autocast_too(kept):
    model, items = kept("turbo"), [{"text": TEXT, "seed": 3}, {"text": "One.", "seed": 4}]
    turbo.apply(model, plainly())
    expected = model.turbo.batch(items)
    turbo.apply(model, config())
    wavs = model.turbo.batch(items)
    assert len(wavs) == 2 and not all(map(torch.equal, wavs, expected))


def test_graphs_give_way(simulated):
    model = simulated.get("english")
    turbo.apply(model, config(decoding=QUIET))
    report = {step.name: step.reason for step in model.turbo.plan.steps}
    assert "CUDA graphs" not in report["decoding"] + report["flow"] and "without CUDA graphs" in report["precision"]


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"precision": {"t3": "bfloat16"}}, 'precision.t3 is "bfloat16": weights are cast once or at every use'),
        ({"preset": "fast"}, 'set precision.t3 = "float32", or drop autocast'),
        ({"precision": {"flow": "auto"}}, "precision.flow is"),
        ({"decoding": {"kernel": "numba"}}, 'decoding.kernel is "numba": only torch'),
        ({"decoding": {"kernel": "compile"}}, 'decoding.kernel is "compile": only torch'),
        ({"flow": {"compile": True}}, "flow.compile is true"),
        ({"decoding": {"enabled": False}, "flow": {"enabled": False}}, "they would use it"),
    ],
)
def test_what_it_contradicts(sections, said):
    asked = {"fidelity": "lossy", **sections, "precision": {"autocast": "bfloat16", **sections.get("precision", {})}}
    with pytest.raises(InvalidConfigError) as error:
        turbo.OptimizationConfig(**asked)
    assert said in str(error.value)


def test_it_is_for_who_asks(english):
    assert not any(turbo.OptimizationConfig(preset=name).precision.autocast for name in PRESETS)
    with pytest.raises(InvalidConfigError, match="above the ceiling"):
        turbo.OptimizationConfig(precision={"autocast": "bfloat16"})
    step = turbo.inspect(english, config(decoding={"enabled": False})).step("precision")
    assert step.status == "on"
    with pytest.raises(UnavailablePassError, match=r"autocast of T3 needs the pass decoding"):
        asked = {"autocast": "bfloat16", "enabled": True}
        turbo.apply(english, {**config(decoding={"enabled": False}), "precision": asked})


def test_a_device_without_it():
    assert why_no_autocast(torch.device("cpu"), torch.bfloat16) == ""
    with pytest.warns(UserWarning, match="not supported"):  # torch's own
        assert "no autocast to float64 on cpu" in why_no_autocast(torch.device("cpu"), torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "no autocast to float64 on cpu" in why_no_autocast(torch.device("cpu"), torch.float64)
    assert "no autocast to bfloat16 on meta" in why_no_autocast(torch.device("meta"), torch.bfloat16)


def test_looking_for_autocast_leaves_the_filters_of_warnings_alone():
    """They are the process's: two threads that each put theirs back leave those of one of them behind."""
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: why_no_autocast(torch.device("cpu"), torch.bfloat16), range(2000)))
    finally:
        sys.setswitchinterval(interval)
        left, warnings.filters[:] = list(warnings.filters), before
    assert left == before
