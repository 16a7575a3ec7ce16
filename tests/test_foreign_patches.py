"""Reverting below what an app has put around the entry points and the watermarker since ``apply``."""

from __future__ import annotations

import copy
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import request_for, speak
from snapshots import difference, snapshot

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import ForeignPatchWarning, SpeechTruncatedWarning, WatermarkWarning

LEFT = "left on {}. What this package had put below it does nothing any more"


class AppsWrapper:
    """Around a method of a model, as apps do it: without ``functools.wraps``. ``calls``: how often it ran."""

    def __init__(self, model, name):
        self.calls, inner = 0, getattr(model, name)

        def wrapper(*args, **kwargs):
            self.calls += 1
            return inner(*args, **kwargs)

        self.function = wrapper
        setattr(model, name, wrapper)


class AppsMarker:
    """Around a watermarker."""

    def __init__(self, inner):
        self.inner = inner

    def apply_watermark(self, signal, sample_rate, **options):
        return self.inner.apply_watermark(signal, sample_rate=sample_rate, **options)


@pytest.fixture
def clean(models, request):
    """The model of a family, which must be as it was when the test is over."""
    model = models(request.param)
    speak(model)  # upstream's own leaves a submodule and other kinds of tensors
    before, watermarker = snapshot(model), model.watermarker
    yield model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ForeignPatchWarning)
        turbo.revert(model)
    for name in {"generate", "prepare_conditionals", "set_target_voice"} & vars(model).keys():
        delattr(model, name)
    model.watermarker = watermarker
    found = difference(before, snapshot(model))
    assert [path for path in found if "patched_model" not in path] == []  # which upstream builds anew in every call


def quiet(preset):
    return {"preset": preset, "decoding": {"progress": "off"}}


@pytest.mark.parametrize("preset", ["exact", "auto"])
@pytest.mark.parametrize("clean", ["english", "turbo", "vc"], indirect=True)
def test_passes_become_inert_below_an_apps_wrapper_of_generate(clean, preset):
    theirs, before = speak(clean), snapshot(clean)
    turbo.apply(clean, quiet(preset))
    app = AppsWrapper(clean, "generate")
    with pytest.warns(ForeignPatchWarning, match=LEFT.format(r"Chatterbox\w+\.generate")):
        turbo.revert(clean)
    assert difference(before, snapshot(clean)) == ["/model: ['generate']"]
    assert clean.generate is app.function and not hasattr(clean, "turbo")
    assert torch.equal(speak(clean), theirs) and app.calls == 1


@pytest.mark.parametrize("clean", ["english"], indirect=True)
def test_applying_again_works_above_and_without_it(clean):
    theirs = speak(clean)
    turbo.apply(clean, quiet("exact"))
    app = AppsWrapper(clean, "generate")
    with pytest.warns(ForeignPatchWarning):
        turbo.revert(clean)
    turbo.apply(clean, quiet("exact"))
    assert torch.equal(speak(clean), theirs) and app.calls == 1
    assert "t3" in clean.turbo.timings() and "decoding" in clean.turbo.plan.running
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForeignPatchWarning)
        turbo.revert(clean)  # the new layer is on top
        assert clean.generate is app.function
        del clean.generate
        turbo.apply(clean, quiet("exact"))
        assert torch.equal(speak(clean), theirs) and app.calls == 1
        turbo.revert(clean)


@pytest.mark.parametrize("clean", ["english"], indirect=True)
def test_another_configuration_replaces_the_one_below(clean):
    turbo.apply(clean, quiet("exact"))
    app = AppsWrapper(clean, "generate")
    with pytest.warns(ForeignPatchWarning):
        turbo.apply(clean, {"decoding": {"progress": "off", "max_new_tokens": 10}})
    with pytest.warns(SpeechTruncatedWarning):
        speak(clean)
    assert app.calls == 1


@pytest.mark.parametrize("clean", ["english", "vc"], indirect=True)
def test_the_same_for_voices(clean, voice):
    name = "set_target_voice" if hasattr(clean, "set_target_voice") else "prepare_conditionals"
    key = "target_voice_path" if hasattr(clean, "set_target_voice") else "audio_prompt_path"
    own = clean.ref_dict if key == "target_voice_path" else clean.conds
    theirs = speak(clean, **{key: voice})
    turbo.apply(clean, quiet("auto"))
    app = AppsWrapper(clean, name)
    with pytest.warns(ForeignPatchWarning, match=name):
        turbo.revert(clean)
    assert torch.equal(speak(clean, **{key: voice}), theirs) and app.calls == 1
    setattr(clean, "ref_dict" if key == "target_voice_path" else "conds", own)


@pytest.mark.parametrize("clean", ["english"], indirect=True)
def test_the_same_for_the_watermarker(clean):
    theirs, own = speak(clean), clean.watermarker
    turbo.apply(clean, quiet("auto"))
    app = clean.watermarker = AppsMarker(clean.watermarker)
    seen = clean.watermarker.inner._self_around
    assert seen is not None
    with pytest.warns(ForeignPatchWarning, match=r"\.watermarker"):
        turbo.revert(clean)
    assert clean.watermarker is app
    assert torch.equal(speak(clean), theirs)
    assert clean.watermarker.inner.__wrapped__.__wrapped__ is own  # the recorder's, the guard's, PerTh


@pytest.mark.parametrize("clean", ["english"], indirect=True)
def test_a_call_that_waited_meanwhile_passes_the_apps_wrapper_once(clean):
    theirs, found = speak(clean), []
    turbo.apply(clean, quiet("auto"))
    lock, app = clean.turbo.lock, AppsWrapper(clean, "generate")
    request = request_for(clean)
    with lock:
        thread = threading.Thread(target=lambda: found.append(clean.generate(**request)))
        thread.start()
        while not app.calls:
            thread.join(0.01)
        with pytest.warns(ForeignPatchWarning):
            turbo.revert(clean)
        torch.manual_seed(0)
    thread.join()
    assert app.calls == 1 and torch.equal(found[0], theirs)


class AppsUnmarked:
    """Around a model's ``generate``: gives what the watermarker has not seen, in a shape of the app's own."""

    def __init__(self, model, shape):
        inner = model.generate

        def wrapper(*args, **kwargs):
            marker, model.watermarker = model.watermarker, SimpleNamespace(apply_watermark=lambda wav, **_: wav)
            try:
                return inner(*args, **kwargs).reshape(shape)
            finally:
                model.watermarker = marker

        model.generate = wrapper


@pytest.mark.parametrize("shape", [(1, -1), (-1,), (2, -1)], ids=["mono", "flat", "stereo"])
@pytest.mark.parametrize("clean", ["english"], indirect=True)
def test_the_output_of_an_apps_generate_is_marked(clean, shape):
    detect = clean.watermarker.get_watermark
    AppsUnmarked(clean, shape)
    turbo.apply(clean, quiet("exact"))
    assert "watermark" in clean.turbo.plan.running
    with pytest.warns(WatermarkWarning, match="was marked now"):
        wav = speak(clean)
    assert wav.reshape(shape).shape == wav.shape
    assert all(detect(each.numpy(), sample_rate=clean.sr).mean() == 1.0 for each in wav.reshape(-1, wav.shape[-1]))


@pytest.mark.parametrize("clean", ["english"], indirect=True)
def test_the_call_that_notices_a_change_passes_every_guard(clean):
    """Below an app's wrapper the guards that notice are no longer the model's, and the new ones lie above."""
    theirs = speak(clean)
    turbo.apply(clean, quiet("exact"))
    app = AppsWrapper(clean, "generate")
    clean.ve, own = copy.deepcopy(clean.ve), clean.ve
    try:
        given = speak(clean)
        assert len(clean.turbo.renewals) == 1 and {"watermark", "decoding"} <= set(clean.turbo.plan.running)
        assert "t3" in clean.turbo.timings(), "the new guards' recorder has seen the call"
        assert torch.equal(given, theirs) and app.calls == 1
    finally:
        clean.ve = own
