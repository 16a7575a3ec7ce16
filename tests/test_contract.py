"""Upstream's patch points: a new release of chatterbox-tts that moves one fails here first, by its name."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import FAMILIES, require

from chatterbox_turbo import synthetic
from chatterbox_turbo.runtime.t3.backbone import TransformersBackbone
from chatterbox_turbo.upstream import alignment, t3
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.patch_points import check_all, digest, patch_points


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_told_by_looking(models, family):
    parts = identify(models(family))
    assert parts.family == family
    assert parts.voice is not None
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.modules().items()}
    assert all(sizes.values()) and ("t3" in sizes) == (family != "vc")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_patch_point_of_the_installed_release_fits(models, family):
    findings = check_all(identify(models(family)))
    assert len(findings) == len(patch_points(family)) >= 7
    assert {f.path: f.problem for f in findings if f.problem} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_part_is_named(models, family):
    parts = identify(models(family))
    real = parts.model.watermarker
    parts.model.watermarker = None
    try:
        problems = {f.path: f.problem for f in check_all(parts) if f.problem}
    finally:
        parts.model.watermarker = real
    assert problems["watermarker.apply_watermark"] == "the model has no watermarker"


def test_a_watermarker_that_is_not_perths_is_named(english):
    import perth

    import chatterbox_turbo as turbo

    real = english.watermarker
    english.watermarker = perth.DummyWatermarker()
    try:
        reason = turbo.inspect(english).step("watermark").reason
    finally:
        english.watermarker = real
    assert "DummyWatermarker, not PerTh's" in reason


def test_digest_ignores_what_does_not_matter_and_sees_what_does():
    def plain():
        def step(x):
            return x + 1

        return step

    def decorated_with_words():
        def step(x):
            """Docstring."""
            print("said")
            return x + 1  # comment

        return step

    def changed():
        def step(x):
            return x + 2

        return step

    assert digest(plain()) == digest(decorated_with_words()) != digest(changed())
    assert digest(len) == "unknown"


def test_the_token_model_is_read_as_it_is(models):
    llama, gpt2 = identify(models("english")).t3, identify(models("turbo")).t3
    assert (t3.is_llama(llama), t3.is_llama(gpt2)) == (True, False)
    assert (t3.start_token(llama), t3.stop_token(llama)) == (6561, 6562)
    assert t3.token_capacity(llama) == 4096
    assert t3.token_capacity(gpt2) == gpt2.tfmr.config.n_positions
    assert alignment.analyzer_class(llama) is None


def test_nano_is_told_from_turbo():
    require("nano")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert identify(synthetic.build("nano", "tiny")).family == "nano"


def test_a_parameter_under_its_new_name_fits_and_is_used(english):
    """Transformers 5.24 renames `past_key_values`; the old name works there, with a warning at each call."""
    model = english.t3.tfmr
    plain = type(model)
    new = "cache" in inspect.signature(plain.forward).parameters
    old_name, new_name = ("cache", "past_key_values") if new else ("past_key_values", "cache")
    embeds = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    seen = []

    class Renamed(plain):
        def forward(self, inputs_embeds=None, use_cache=None, **others):
            seen.append(new_name in others)
            past = others.pop(new_name, None)
            output = plain.forward(self, inputs_embeds=inputs_embeds, use_cache=use_cache, **others, **{old_name: past})
            return SimpleNamespace(last_hidden_state=output.last_hidden_state, **{new_name: output[old_name]})

        taken = [("self", 1), ("inputs_embeds", 1), (new_name, 1), ("use_cache", 1), ("others", 4)]
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name, kind in taken])
        forward.__module__ = plain.forward.__module__

    def logits():
        backbone = TransformersBackbone(model, english.t3.speech_head)
        backbone.begin(1, 2)
        with torch.inference_mode():
            return backbone.admit([embeds[:, :-1]], [1]), backbone.step(embeds[:, -1])[0]

    expected = logits()
    model.__class__ = Renamed
    try:
        assert {f.path: f.problem for f in check_all(identify(english)) if f.problem} == {}
        assert all(torch.equal(*pair) for pair in zip(logits(), expected, strict=True))
    finally:
        model.__class__ = plain
    assert seen == [True, True]
