"""A part replaced, a layer altered, a class patched after ``apply``: what speaks is what is there."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import difference, snapshot, speak
from torch import nn
from torch.nn.utils import parametrize

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import TurboError, UnavailablePassError, WatermarkWarning
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


def reach(model, path):
    *way, name = path.split(".")
    owner = model
    for step in way:
        owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
    return owner, name


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


@pytest.fixture(scope="module")
def fresh():
    """``fresh(family)``: models of this module's own, whose parts it replaces."""
    built = {}

    def get(family):
        if family not in built:
            built[family] = synthetic.build(family, "tiny", stop_after=None if family == "vc" else 12)
        return built[family]

    return get


def spoken(model, voice, path=""):
    """Samples with a voice that is encoded anew where nobody keeps it; of the voice encoder its embedding.

    The tokens of a tiny model hardly depend on that.
    """
    if hasattr(model, "set_target_voice"):
        return speak(model, target_voice_path=voice)
    samples = speak(model, audio_prompt_path=voice)
    return model.conds.t3.speaker_emb.clone() if path == "ve" else samples


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
    old = model.watermarker
    turbo.apply(model, QUIET)
    speak(model)
    marks = []

    class Counting(perth.PerthImplicitWatermarker):
        def apply_watermark(self, wav, sample_rate, **options):
            marks.append(1)
            return super().apply_watermark(wav, sample_rate=sample_rate, **options)

    try:
        model.watermarker = counting = Counting()
        with warnings.catch_warnings():
            warnings.simplefilter("error", WatermarkWarning)
            given = speak(model)
        assert marks == [1] and "watermark" in model.turbo.plan.running
        turbo.revert(model)
        assert model.watermarker is counting, "what the app has put there is the app's"
        assert snr_db(given, speak(model)) > FLOOR
    finally:
        turbo.revert(model)
        model.watermarker = old


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


# alterations of a layer that change what upstream says; each returns what takes it back


def _forward_replaced(layer):
    own = layer.forward
    layer.forward = lambda *args, **kwargs: 3.0 * own(*args, **kwargs).flip(-1)
    return lambda: delattr(layer, "forward")


def _hooked(layer):
    return layer.register_forward_hook(lambda module, args, output: 3.0 * output.flip(-1)).remove


def _parametrized(layer):
    class Scaled(nn.Module):
        def forward(self, weight):
            return 3.0 * weight.flip(0)

    parametrize.register_parametrization(layer, "weight", Scaled())
    return lambda: parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


class _Adapter(nn.Module):
    """As PEFT's: shows the base layer's weight and adds to its result."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, *args):
        return 3.0 * self.base_layer(*args).flip(-1)


class _Opaque(nn.Module):
    """A wrapper without a weight."""

    def __init__(self, base):
        super().__init__()
        self.inner = base

    def forward(self, *args):
        return 3.0 * self.inner(*args).flip(-1)


ALTERATIONS = {"forward": _forward_replaced, "hook": _hooked, "parametrization": _parametrized}
WRAPPERS = {"adapter": _Adapter, "opaque": _Opaque}
ALTERED = [
    *(("english", "t3.tfmr.layers.1.mlp.up_proj", how, "after") for how in (*ALTERATIONS, *WRAPPERS)),
    ("english", "t3.tfmr.layers.1.mlp.up_proj", "opaque", "before"),
    ("english", "t3.tfmr.layers.0.self_attn.q_proj", "adapter", "before"),
    ("english", "t3.speech_head", "hook", "after"),
    ("english", "s3gen.flow.encoder.encoders.0.feed_forward.w_2", "opaque", "before"),
    ("english", "s3gen.flow.encoder.encoders.0.feed_forward.w_2", "hook", "after"),
    ("english", "s3gen.flow.decoder.estimator.final_proj", "forward", "after"),
    ("turbo", "t3.tfmr.h.0.mlp.c_fc", "adapter", "after"),
    ("turbo", "s3gen.flow.decoder.estimator.mid_blocks.0.1.0.attn1.to_q", "parametrization", "after"),
]


def alter(model, path, how):
    owner, name = reach(model, path)
    layer = owner[int(name)] if name.isdigit() else getattr(owner, name)
    if how in ALTERATIONS:
        return ALTERATIONS[how](layer)
    setattr(owner, name, WRAPPERS[how](layer))
    return lambda: setattr(owner, name, layer)


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
    if not model.turbo.plan.step("precision").reason:
        pytest.skip("half precision does not run here")
    undo = alter(model, "t3.tfmr.layers.1.mlp.up_proj", "hook")
    try:
        speak(model)
        assert model.t3.speech_head.weight.dtype == torch.float32
        assert "not t3" in model.turbo.plan.step("precision").reason
    finally:
        undo()
        turbo.revert(model)


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

        monkeypatch.setattr(type(part) if where == "class" else part, name, patched)
        spoken(model, voice)
        assert calls
        monkeypatch.undo()
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
        model.__class__ = cls
        if how == "property":
            model.watermarker = marker


@pytest.mark.parametrize("how", ["overwritten", "deleted"])
def test_a_lost_handle_is_found_again(fresh, how):
    model = fresh("english")
    before = snapshot(model)
    for verb in (turbo.revert, lambda model: turbo.apply(model, "exact")):
        turbo.apply(model, QUIET)
        if how == "overwritten":
            model.turbo = "the app's"
        else:
            del model.turbo
        verb(model)
        if how == "overwritten" and verb is turbo.revert:
            assert model.turbo == "the app's"
            del model.turbo
    assert model.turbo.config.preset == "exact"
    turbo.revert(model)
    assert difference(before, snapshot(model)) == []
