"""The watermark: in every output, found by PerTh's own detector, put back where somebody took it away."""

from __future__ import annotations

import pytest
import torch
from cases import FAMILIES, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import UnavailablePassError, WatermarkWarning

QUIET = {"decoding": {"progress": "off"}}


def confidence(model, wav):
    return float(model.watermarker.get_watermark(wav.squeeze(0).numpy(), sample_rate=model.sr).mean())


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_every_output_is_marked(model):
    turbo.apply(model, QUIET)
    assert [confidence(model, speak(model, seed)) for seed in range(3)] == [1.0] * 3


def test_the_detector_tells_marked_from_unmarked(english):
    real = english.watermarker

    class Unmarked:
        def apply_watermark(self, signal, sample_rate):
            return signal

    english.watermarker = Unmarked()
    try:
        wav = speak(english)
    finally:
        english.watermarker = real
    assert confidence(english, wav) < 1.0


def test_the_network_builds_no_autograd_graph(models):
    """Upstream's Turbo model calls it outside inference mode."""
    model, modes = models("turbo"), []
    hook = model.watermarker.perth_net.encoder.register_forward_pre_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    try:
        speak(model)
        with turbo.optimized(model, QUIET):
            speak(model)
    finally:
        hook.remove()
    assert modes == [False, True]


def test_a_swapped_watermarker_is_noticed_with_a_warning(english):
    import perth

    turbo.apply(english, QUIET)
    guarded = english.watermarker
    english.watermarker = perth.DummyWatermarker()
    try:
        with pytest.warns(WatermarkWarning):
            wav = speak(english)
    finally:
        english.watermarker = guarded
    assert confidence(english, wav) == 1.0


def test_detection_on_every_output_can_be_asked_for(english):
    turbo.apply(english, {**QUIET, "watermark": {"detect": True}})
    calls = []
    hook = english.watermarker.perth_net.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        speak(english)
    finally:
        hook.remove()
    assert calls == [1]


def test_without_perth_the_remedy_is_told(english):
    real = english.watermarker
    english.watermarker = None
    try:
        with pytest.raises(UnavailablePassError, match="setuptools<81"):
            turbo.apply(english, {"watermark": {"enabled": True}})
        assert turbo.inspect(english).step("watermark").status == "skipped"
    finally:
        english.watermarker = real
