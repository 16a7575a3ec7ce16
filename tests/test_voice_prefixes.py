"""Keys and values of a voice's positions: computed once a voice, the same numbers whether they were there or not."""

from __future__ import annotations

import pytest
import torch
from cases import TEXT, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.measure.fidelity import sample
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.t3 import backbone as backbones
from chatterbox_turbo.runtime.t3.backbone import StaticBackbone, TransformersBackbone
from chatterbox_turbo.runtime.t3.step_choice import choose_step
from chatterbox_turbo.runtime.t3.voice_prefixes import LEAST
from chatterbox_turbo.upstream import t3 as upstream_t3
from chatterbox_turbo.upstream import t3_weights
from chatterbox_turbo.upstream.warmup import copy_voice

ROOM = 2**26
LONG = LEAST + 20


@pytest.fixture
def weights(models, request):
    t3, journal = models(getattr(request, "param", "turbo")).t3, Journal()
    t3_weights.fuse(t3, journal)
    yield t3_weights.read(t3)
    journal.undo()


@pytest.fixture
def computed(monkeypatch):
    """Positions that each prefill has computed, padding included."""
    lengths, prefill = [], backbones.prefill

    def counted(weights, cache, embeds, *rest):
        lengths.append(embeds.size(0) * embeds.size(1))
        return prefill(weights, cache, embeds, *rest)

    monkeypatch.setattr(backbones, "prefill", counted)
    return lengths


def made(weights, kernel="torch", room=ROOM):
    return StaticBackbone(weights, choose_step(weights, (), kernel, graphs=False)[0], voice_bytes=room)


def prefixes(weights, *texts, voices=(0,)):
    """Embeddings of voices (numbers), with texts of so many positions behind them."""
    numbers = [torch.Generator().manual_seed(voice) for voice in range(1 + max(voices))]
    each = [torch.randn(1, LONG, weights.width, generator=one) for one in numbers]
    text = torch.Generator().manual_seed(99)
    return [
        torch.cat([each[voices[n % len(voices)]], torch.randn(1, length, weights.width, generator=text)], dim=1)
        for n, length in enumerate(texts)
    ]


def begun(backbone, embeds, voice=LONG, rows=1):
    backbone.begin(len(embeds), rows)
    return backbone.admit(embeds, [10] * len(embeds), [voice] * len(embeds))


@pytest.mark.parametrize("kernel", ["torch", "numba"])
@pytest.mark.parametrize("weights", ["turbo", "english"], indirect=True)
def test_logits_are_those_of_transformers(models, request, weights, kernel):
    """Of several texts and voices at once, and in the steps behind them."""
    t3 = models(request.node.callspec.params["weights"]).t3
    ours = made(weights, kernel)
    theirs = TransformersBackbone(upstream_t3.backbone(t3), upstream_t3.head(t3))
    embeds = prefixes(weights, 7, 31, 30, 1, voices=(0, 0, 1, 0))
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        pairs = [(begun(ours, embeds), begun(theirs, embeds))]
        for _ in range(3):
            step = torch.randn(4, weights.width, generator=generator)
            pairs.append((ours.step(step)[0], theirs.step(step)[0]))
    for logits, expected in pairs:
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_only_the_text_is_computed_and_the_numbers_are_the_same(weights, computed):
    first, second = prefixes(weights, 12, 30)
    (other,) = prefixes(weights, 30, voices=(1,))
    with torch.inference_mode():
        backbone = made(weights)
        before = begun(backbone, [second])
        assert computed == [LONG, 30]
        begun(backbone, [first])
        begun(backbone, [other])
        assert computed[2:] == [12, LONG, 30]
        backbone.rest()
        assert torch.equal(begun(backbone, [second]), before)
        assert computed[5:] == [30]
        assert torch.equal(begun(made(weights), [second]), before), "nothing depends on what came before"
        begun(backbone, [first, second])
        assert computed[-1] == 2 * 30, "texts together"


def test_what_has_no_long_voice_is_computed_whole(weights, computed):
    (embeds,) = prefixes(weights, 12)
    with torch.inference_mode():
        for backbone, given, voice, rows in (
            (made(weights), embeds, LEAST - 1, 1),
            (made(weights), embeds, 0, 1),
            (made(weights), embeds.expand(2, -1, -1), LONG, 2),  # with guidance
            (made(weights, room=0), embeds, LONG, 1),
        ):
            computed.clear()
            begun(backbone, [given], voice, rows)
            assert computed == [rows * (LONG + 12)] and backbone.voices.nbytes == 0


def test_voices_that_were_not_used_for_the_longest_time_make_room(weights, computed):
    each = [prefixes(weights, 5, voices=(voice,))[0] for voice in range(3)]
    with torch.inference_mode():
        backbone = made(weights)
        begun(backbone, each[:1])
        size = backbone.voices.nbytes
        backbone = made(weights, room=2 * size)
        for number in (0, 1, 0, 2, 0, 1):
            begun(backbone, [each[number]])
            assert backbone.voices.nbytes <= 2 * size
        found = computed[2:]
        assert found == [LONG, 5, LONG, 5, 5, LONG, 5, 5, LONG, 5], "0 stayed, 1 went for 2"
        backbone.release()
        assert backbone.voices.nbytes == 0
        alone = made(weights, room=size // 2)
        begun(alone, each[:1])
        assert alone.voices.nbytes == 0


def voice_of(model, seed):
    """The model's voice with a prompt of 15 s; the built-in one of a tiny model is short."""
    voice = copy_voice(model.conds)
    some = torch.Generator().manual_seed(seed)
    voice.t3.cond_prompt_speech_tokens = torch.randint(0, 6561, (1, 375), generator=some)
    voice.t3.cond_prompt_speech_emb = None  # that upstream keeps of the first call
    return voice


QUIET = {"decoding": {"progress": "off", "kernel": "torch"}}


@pytest.mark.parametrize("model", ["turbo"], indirect=True)
def test_a_model_says_the_same_with_any_voice_at_any_time(model, computed):
    turbo.apply(model, QUIET)
    request, low, high = {"text": TEXT}, voice_of(model, 1), voice_of(model, 2)
    model.conds = low
    expected = sample(model, 0, request)
    model.conds = high
    other = sample(model, 0, request)
    assert not torch.equal(other.tokens, expected.tokens)
    computed.clear()
    for voice, wanted in ((low, expected), (high, other), (low, expected)):
        model.conds = voice
        again = sample(model, 0, request)
        assert torch.equal(again.tokens, wanted.tokens) and torch.equal(again.wav, wanted.wav)
    assert len(computed) == 3 and max(computed) < LEAST
    assert model.turbo.token_model.backbone.voices.nbytes > 0
    held = model.turbo.memory()["held_bytes"]
    turbo.revert(model)
    turbo.apply(model, {"decoding": {**QUIET["decoding"], "voice_bytes": 0}})
    again = sample(model, 0, request)
    assert torch.equal(again.tokens, expected.tokens)
    assert model.turbo.memory()["held_bytes"] < held


@pytest.mark.parametrize("model", ["turbo"], indirect=True)
def test_other_weights_have_voices_of_their_own(model, computed):
    turbo.apply(model, QUIET)
    weight = upstream_t3.backbone(model.t3).h[0].attn.c_proj.weight
    model.conds = voice_of(model, 1)
    speak(model)
    computed.clear()
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        speak(model)
        assert len(computed) == 2 and computed[0] > LEAST, "the voice anew"
    finally:
        with torch.no_grad():
            weight.div_(1.5)
