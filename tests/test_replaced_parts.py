"""A part replaced, a layer altered, a class patched after ``apply``: what speaks is what is there."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from alterations import reach
from cases import speak
from snapshots import difference, snapshot
from torch import nn

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import TurboError, WatermarkWarning
from chatterbox_turbo.measure.fidelity import snr_db

QUIET = {"decoding": {"progress": "off"}}
FLOOR = 60  # dB, of what is promised as numerical


def other(module: nn.Module) -> nn.Module:
    """A copy with other weights, as a fine-tune has them."""
    with torch.no_grad():
        twin = copy.deepcopy(module)
        for number, parameter in enumerate(twin.parameters()):
            torch.manual_seed(number)
            parameter.add_(0.5 * parameter.std(correction=0) * torch.randn_like(parameter))
    return twin


# what is replaced, and under which preset
SWAPS = [
    *(
        ("english", path, "auto")
        for path in (
            "t3",
            "t3.tfmr",
            "t3.speech_head",
            "t3.speech_emb",
            "t3.cond_enc",
            "s3gen",
            "s3gen.flow",
            "s3gen.flow.encoder",
            "s3gen.flow.decoder",
            "s3gen.flow.decoder.estimator",
            "s3gen.mel2wav",
            "s3gen.tokenizer",
            "s3gen.speaker_encoder",
            "ve",
        )
    ),
    *(("english", path, "exact") for path in ("t3.tfmr", "s3gen", "ve")),
    *(("turbo", path, "auto") for path in ("t3", "s3gen.flow.decoder.estimator", "ve")),
    ("multilingual", "t3.tfmr", "auto"),
    *(("vc", path, "auto") for path in ("s3gen", "s3gen.speaker_encoder")),
]


def spoken(model, voice, path=""):
    """Samples with a voice that is encoded anew where nobody keeps it; of the voice encoder its embedding.

    The tokens of a tiny model hardly depend on that.
    """
    if hasattr(model, "set_target_voice"):
        return speak(model, target_voice_path=voice)
    samples = speak(model, audio_prompt_path=voice)
    return model.conds.t3.speaker_emb.clone() if path == "ve" else samples


@pytest.mark.exhaustive
@pytest.mark.parametrize("family, path, preset", SWAPS)
def test_the_part_that_is_there_speaks(fresh, voice, family, path, preset):
    model = fresh(family)
    owner, name = reach(model, path)
    old, new = getattr(owner, name), other(getattr(owner, name))
    try:
        turbo.apply(model, {"preset": preset, **QUIET})
        before = spoken(model, voice, path)
        setattr(owner, name, new)
        given = spoken(model, voice, path)
        running = model.turbo.plan.running
        assert model.turbo.renewals[-1] in str(model.turbo.report())
        turbo.revert(model)
        expected = spoken(model, voice, path)
    finally:
        turbo.revert(model)
        setattr(owner, name, old)
    assert expected.shape != before.shape or snr_db(expected, before) < 40, "the other part makes no difference"
    assert expected.shape == given.shape and snr_db(given, expected) > FLOOR
    assert {"vocoder", "conditioning"} <= set(running)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("path", ["ve", "s3gen", "t3"])
def test_weights_that_are_loaded_after_apply_speak(fresh, voice, path, assign):
    """As a fine-tune is loaded into a model that serves."""
    model = fresh("english")
    module = getattr(model, path)
    old = {name: value.clone() for name, value in module.state_dict().items()}
    new = {name: value.clone() for name, value in other(module).state_dict().items()}
    before = spoken(model, voice, path)
    turbo.apply(model, QUIET)
    try:
        assert snr_db(spoken(model, voice, path), before) > FLOOR
        module.load_state_dict(new, assign=assign)
        given = spoken(model, voice, path)
        turbo.revert(model)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters()), "left in one storage"
        expected = spoken(model, voice, path)
    finally:
        turbo.revert(model)
        module.load_state_dict(old)
    assert expected.shape != before.shape or snr_db(expected, before) < 40
    assert expected.shape == given.shape and snr_db(given, expected) > FLOOR


def test_a_voice_and_a_tokenizer_that_are_replaced_are_used(fresh, voice):
    model = fresh("english")
    conds, tokenizer = model.conds, model.tokenizer
    turbo.apply(model, QUIET)
    first = speak(model)
    model.conds = copy.copy(conds)
    model.conds.t3 = type(conds.t3)(**{**vars(conds.t3), "emotion_adv": 1.0 - conds.t3.emotion_adv})
    model.tokenizer = copy.copy(tokenizer)
    model.tokenizer.text_to_tokens = lambda text: tokenizer.text_to_tokens(text[:5])
    try:
        given = speak(model)
        turbo.revert(model)
        expected = speak(model)
    finally:
        turbo.revert(model)
        model.conds, model.tokenizer = conds, tokenizer
    assert snr_db(given, expected) > FLOOR
    assert first.shape != expected.shape or snr_db(first, expected) < 40


def test_another_watermarker_marks_once(fresh):
    import perth

    model = fresh("english")
    old, second, marks = model.watermarker, perth.PerthImplicitWatermarker(), []
    second.perth_net.encoder.register_forward_hook(lambda *_: marks.append(1))
    turbo.apply(model, QUIET)
    speak(model)
    try:
        model.watermarker = second
        with warnings.catch_warnings():
            warnings.simplefilter("error", WatermarkWarning)
            given = speak(model)
        assert marks == [1] and "watermark" in model.turbo.plan.running
        turbo.revert(model)
        assert model.watermarker is second, "what the app has put there is the app's"
        assert snr_db(given, speak(model)) > FLOOR
    finally:
        turbo.revert(model)
        model.watermarker = old


def test_an_apps_analyzer_and_samplers_decide(fresh, monkeypatch):
    from chatterbox.models.t3 import t3 as module

    model = fresh("multilingual")
    turbo.apply(model, QUIET)
    speak(model)
    calls, step = [], module.AlignmentStreamAnalyzer.step

    def counted(self, logits, next_token=None):
        calls.append(1)
        return step(self, logits, next_token)

    monkeypatch.setattr(module.AlignmentStreamAnalyzer, "step", counted)
    given = speak(model)
    assert calls and "AlignmentStreamAnalyzer.step" in model.turbo.plan.step("decoding").reason
    turbo.revert(model)
    assert snr_db(given, speak(model)) > FLOOR

    class Warper(module.MinPLogitsWarper):
        def __call__(self, ids, scores):
            calls.append(2)
            return super().__call__(ids, scores)

    monkeypatch.undo()
    turbo.apply(model, QUIET)
    speak(model)
    assert "numba" in model.turbo.plan.step("decoding").reason or "torch" in model.turbo.plan.step("decoding").reason
    monkeypatch.setattr(module, "MinPLogitsWarper", Warper)
    speak(model)
    assert 2 in calls and "MinPLogitsWarper" in model.turbo.plan.step("decoding").reason


@pytest.mark.parametrize(
    "path, name", [("ve", "embeds_from_wavs"), ("ve", "inference"), ("t3", "inference"), ("s3gen.mel2wav", "decode")]
)
@pytest.mark.parametrize("where", ["class", "object"])
def test_a_method_that_is_patched_after_apply_runs(fresh, monkeypatch, voice, path, name, where):
    if (path, where) == ("t3", "object"):
        pytest.skip("goes on top of this package's own patch, and is called as it is")
    model = fresh("english")
    turbo.apply(model, QUIET)
    try:
        spoken(model, voice)
        owner, attribute = reach(model, path)
        part, calls = getattr(owner, attribute), []
        original = getattr(type(part), name)

        def patched(*args, **kwargs):
            calls.append(1)
            return original(*(args if where == "class" else (part, *args)), **kwargs)

        if where == "class":
            monkeypatch.setattr(type(part), name, patched)
        else:
            setattr(part, name, patched)
        spoken(model, voice)
        assert calls
        monkeypatch.undo()
        vars(part).pop(name, None)
        calls.clear()
        spoken(model, voice)
        assert not calls and {"decoding", "conditioning", "vocoder"} <= set(model.turbo.plan.running)
    finally:
        turbo.revert(model)


@pytest.mark.parametrize("how", ["property", "setattr"])
def test_objects_that_resist(fresh, how):
    model = fresh("english")
    cls = type(model)
    if how == "property":
        marker = vars(model).pop("watermarker")
        model.__class__ = type("Closed", (cls,), {"watermarker": property(lambda self: marker)})
    else:

        def refuse(self, name, value):
            raise AttributeError(f"{name} is frozen")

        model.__class__ = type("Closed", (cls,), {"__setattr__": refuse})
    before = snapshot(model)
    try:
        if how == "property":
            turbo.apply(model, QUIET)
            assert "property" in model.turbo.plan.step("watermark").reason
            turbo.revert(model)
        else:
            with pytest.raises(TurboError, match=r"Cannot set .* of a Closed"):
                turbo.apply(model, QUIET)
        assert difference(before, snapshot(model)) == []
    finally:
        object.__setattr__(model, "__class__", cls)
        if how == "property":
            model.watermarker = marker


@pytest.mark.parametrize("how", ["overwritten", "deleted"])
def test_a_lost_handle_is_found_again(fresh, how):
    model = fresh("english")
    before = snapshot(model)

    def lose():
        if how == "overwritten":
            model.turbo = "the app's"
        else:
            del model.turbo

    turbo.apply(model, QUIET)
    lose()
    turbo.apply(model, "exact")
    assert model.turbo.config.preset == "exact"
    lose()
    turbo.revert(model)
    if how == "overwritten":
        assert model.turbo == "the app's"
        del model.turbo
    assert difference(before, snapshot(model)) == []
