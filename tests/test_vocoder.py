"""The vocoder: samples, source and random numbers to the bit, cached sources, moved weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrize

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import UnsupportedModelError
from chatterbox_turbo.runtime.scratch import Scratch
from chatterbox_turbo.runtime.vocoder import synthesize
from chatterbox_turbo.upstream import vocoder_weights
from chatterbox_turbo.upstream.patch_points import LLAMA

ALONE = {"vocoder": {"enabled": True}, "flow": {"enabled": False}}


def run(model, mel, **options):
    torch.manual_seed(3)
    samples, source = model.s3gen.mel2wav.inference(speech_feat=mel, **options)
    return samples.clone(), source.clone(), torch.rand(1)


@pytest.fixture
def vocoder(models):
    """A model, and a function that runs its vocoder as upstream and as optimized."""
    model = models(LLAMA[0])

    def both(mel, **options):
        expected = run(model, mel, **options)
        with turbo.optimized(model, ALONE):
            return expected, run(model, mel, **options)

    return both


@pytest.mark.parametrize("frames", [1, 2, 50, 333])
@pytest.mark.parametrize("rows", [1, 2])
def test_samples_source_and_generator_are_equal(vocoder, frames, rows):
    mel = torch.randn(rows, 80, frames, generator=torch.Generator().manual_seed(frames))
    expected, given = vocoder(mel)
    assert all(torch.equal(a, b) for a, b in zip(expected, given, strict=True))


def test_a_cached_source_goes_on(vocoder):
    mel = torch.randn(1, 80, 20, generator=torch.Generator().manual_seed(0))
    expected, given = vocoder(mel, cache_source=torch.full((1, 1, 480), 0.1))
    assert all(torch.equal(a, b) for a, b in zip(expected, given, strict=True))
    assert (given[1][..., :480] == 0.1).all()


def test_loud_and_voiced_input(vocoder):
    """Pitches above the voiced threshold, and magnitudes that upstream clips."""
    expected, given = vocoder(30 * torch.randn(1, 80, 40, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(a, b) for a, b in zip(expected, given, strict=True))


def test_parametrizations_stay_and_changed_weights_are_read_anew(models):
    model = models(LLAMA[0])
    module, mel = model.s3gen.mel2wav, torch.randn(1, 80, 10)
    keys = list(module.state_dict())
    before = run(model, mel)[0]
    weight = module.conv_pre.parametrizations.weight.original1
    kept = weight.data
    with turbo.optimized(model, ALONE):
        assert list(module.state_dict()) == keys
        try:
            weight.data = kept * torch.linspace(0.5, 2.0, kept.size(1))[None, :, None]
            changed = run(model, mel)[0]
        finally:
            weight.data = kept
        assert not torch.equal(changed, before)
        assert torch.equal(run(model, mel)[0], before)


def test_folded_weights_and_removed_normalization_give_the_same():
    """Folding, as on a GPU; and a vocoder whose user has folded it already."""
    module = synthetic.build(LLAMA[0], "tiny").s3gen.mel2wav  # its own: parametrized copies share a class
    mel = torch.randn(1, 80, 30, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        lean, folded = (vocoder_weights.read(module, fold=fold) for fold in (False, True))
        assert lean.before.magnitude is not None and folded.before.magnitude is None
        results = [sound(lean, mel), sound(folded, mel)]
        for part in module.modules():
            if parametrize.is_parametrized(part):
                parametrize.remove_parametrizations(part, "weight")
        results.append(sound(vocoder_weights.read(module, fold=False), mel))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def sound(weights, mel):
    torch.manual_seed(1)
    return synthesize(weights, mel, None, Scratch())[0]


def test_another_parametrization_is_refused(models):
    module = copy.deepcopy(models(LLAMA[0]).s3gen.mel2wav)
    module.conv_pre.parametrizations.weight[0].dim = 1
    with pytest.raises(UnsupportedModelError, match="parametrizations"):
        vocoder_weights.check(module)
