"""One graph a token, counted on the simulated machine: launches outside, kernels inside, and the tokens that come."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from cases import SPEAKING

import chatterbox_turbo as turbo
from chatterbox_turbo.runtime.t3.backbone import StaticBackbone, TorchStep
from chatterbox_turbo.runtime.t3.requests import Request
from chatterbox_turbo.runtime.t3.sampling import SamplingParameters
from chatterbox_turbo.runtime.t3.step_choice import choose_step
from chatterbox_turbo.runtime.t3.token_loop import Loop
from chatterbox_turbo.upstream import t3 as upstream_t3

OUTSIDE, INSIDE = 5, 10  # launches a token, kernels a layer
FORMATS = {
    "fp32": {"decoding": {"progress": "off"}},
    "bf16": {"decoding": {"progress": "off"}, "fidelity": "lossy", "precision": {"t3": "bfloat16"}},
}
ALONE = {name: {"enabled": False} for name in ("flow", "vocoder", "conditioning", "watermark")}


def prepared(simulated, family, numbers="fp32", kernel="auto"):
    model = simulated.get(family)
    config = {**FORMATS[numbers], **ALONE}
    config["decoding"] = {**config["decoding"], "kernel": kernel}
    turbo.apply(model, config)
    return model, model.turbo.token_model


def requests(model, lengths, seed=1):
    """Requests of (text length, tokens at most), each with knobs and a generator of its own."""
    made = []
    for number, (length, limit) in enumerate(lengths):
        text = torch.tensor([[255, *range(5, 5 + length), 0]] * 2).to("cuda:0")
        text = text if upstream_t3.is_llama(model.t3) else text[:1]
        with torch.inference_mode():
            embeds, start = upstream_t3.prefix(model.t3, model.conds.t3, text, cfg_weight=0.5)
        knobs = SamplingParameters(0.8 + 0.1 * number, top_p=0.9, min_p=0.05 * (number % 2), guidance=0.5)
        generator = torch.Generator("cuda:0")
        generator.manual_seed(seed + number)
        made.append(Request(embeds, knobs, limit, (start, length + 2), generator))
    return made


def decode(loop, made, slots=None, most=None):
    """Ids of each request; ``most``: the loop is left after so many tokens."""
    ids = {number: [] for number in range(len(made))}
    for token in islice(loop.generate(made, slots), most):
        ids[token.request].append(token.id)
    return ids


@pytest.mark.filterwarnings("ignore::chatterbox_turbo.errors.SpeechTruncatedWarning")
@pytest.mark.parametrize("numbers", FORMATS)
@pytest.mark.parametrize("family", SPEAKING)
def test_a_token_takes_five_launches_and_waits_for_its_event_alone(simulated, family, numbers):
    model, token_model = prepared(simulated, family, numbers)
    assert "fused step in CUDA graphs" in model.turbo.plan.step("decoding").reason
    loop, seen = token_model._loop([]), {}
    for limit in (2, 4, 10):  # the first captures
        made = requests(model, [(6, limit)])
        with simulated.machine.watching() as seen[limit]:
            decode(loop, made)
        assert not seen[limit].waits, seen[limit].waits
    per_token = {name: (seen[10].counts[name] - seen[4].counts[name]) / 6 for name in seen[10].counts}
    assert per_token["replays"] == per_token["event_waits"] == 1
    assert per_token["launches"] + per_token["download"] <= OUTSIDE
    assert per_token.get("upload", 0) == per_token.get("captures", 0) == 0
    assert not loop._step.runner.fallbacks


def shallow(token_model, weights, kernel):
    """A loop over some of the layers, and what is said of its step."""
    step, remark = choose_step(weights, (), kernel, True)
    whole = token_model._loop([])
    loop = Loop(StaticBackbone(weights, step), whole.procedure, whole.vocabulary, None, 0)
    return loop, remark


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("numbers", FORMATS)
@pytest.mark.parametrize("family", ["english", "turbo"])
def test_a_layer_takes_ten_kernels_and_without_triton_fewer_than_before(simulated, family, numbers, kernel):
    model, token_model = prepared(simulated, family, numbers)
    weights, counts = token_model.backbone.weights, []
    for layers in (1, 2):
        loop, remark = shallow(token_model, replace(weights, layers=weights.layers[:layers]), kernel)
        decode(loop, requests(model, [(6, 3)]))
        assert remark == f"{'fused' if kernel == 'auto' else 'torch'} step in CUDA graphs"
        (entry,) = loop._step.runner._entries.values()
        counts.append(entry.graph.kernels)
    layer, rest = counts[1] - counts[0], 2 * counts[0] - counts[1]
    assert layer <= (INSIDE if kernel == "auto" else 34)  # it was 50 in bf16
    assert rest < 80


@pytest.mark.parametrize("family", SPEAKING)
def test_graphs_give_the_tokens_of_the_eager_step(simulated, family):
    """Requests that come and go, more than a graph is padded to, a stop in the middle, growth of the cache."""
    model, token_model = prepared(simulated, family)
    captured = token_model._loop([])
    weights = token_model.backbone.weights
    step = TorchStep(weights, token_model._watch)
    eager = Loop(StaticBackbone(weights, step), captured.procedure, captured.vocabulary, None, 0)
    if captured.constraint is not None:
        eager.constraint = type(captured.constraint)(captured.vocabulary.stop, "cuda:0")
    for lengths, slots in (([(6, 5)], None), ([(4, 3), (9, 6), (2, 6), (6, 3), (7, 5)], None),
                           ([(4, 4), (9, 7), (2, 3)], 2)):  # fmt: skip
        theirs, ours = requests(model, lengths), requests(model, lengths)
        assert decode(captured, ours, slots) == decode(eager, theirs, slots)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.generator.get_state(), other.generator.get_state())
    grown = [requests(model, [(5, 300)]) for _ in range(2)]
    assert decode(captured, grown[0], most=4) == decode(eager, grown[1], most=4)
    assert token_model.backbone.cache.capacity > 256
    assert captured.lag > 0 and simulated.machine.replays > 20


def test_attention_that_is_kept_is_that_of_the_eager_step(simulated):
    """Of one of two requests, which moves to the place of the other; without a wait more."""
    model, token_model = prepared(simulated, "multilingual")
    captured, weights = token_model._loop([]), token_model.backbone.weights
    step = TorchStep(weights, token_model._watch)
    eager = Loop(StaticBackbone(weights, step), captured.procedure, captured.vocabulary, None, 0)
    eager.constraint = type(captured.constraint)(captured.vocabulary.stop, "cuda:0")

    def made():
        some = requests(model, [(4, 2), (2, 4)])
        some[1].aligned = True
        return some

    found = []
    for loop in (captured, eager):
        ends = {token.request: token for token in loop.generate(made()) if token.end is not None}
        assert ends[0].attention is None and ends[1].attention.shape == (ends[1].index + 1, 4)
        found.append(ends[1].attention)
    assert torch.allclose(*found, rtol=0, atol=1e-6) and found[0][1:].sum(dim=1).min() > 0
    some = made()
    with simulated.machine.watching() as seen:  # its graphs are there
        list(captured.generate(some))
    assert not seen.waits and not seen.counts.get("captures", 0)


def test_a_capture_that_fails_an_abandoned_loop_and_a_new_key_change_no_token(simulated):
    model, token_model = prepared(simulated, "english")
    loop = token_model._loop([])
    expected = decode(loop, requests(model, [(6, 6), (3, 6)]))
    tokens = loop.generate(requests(model, [(4, 50)], seed=9))
    next(tokens), next(tokens)
    tokens.close()
    assert decode(loop, requests(model, [(6, 6), (3, 6)])) == expected
    loop._step.runner.reset()
    simulated.machine.fail_captures(1)
    assert decode(loop, requests(model, [(6, 6), (3, 6)])) == expected
    assert len(loop._step.runner.fallbacks) == 1
    made = requests(model, [(6, 6), (3, 6)])
    made[1].knobs = SamplingParameters(temperature=0.0, guidance=0.5)  # another set of filters, another graph
    with simulated.machine.watching() as seen:
        assert decode(loop, made)[0] == expected[0]
    assert seen.counts["captures"] == 1


def test_embeddings_that_somebody_replaces_are_captured_anew(simulated):
    model, token_model = prepared(simulated, "english")
    loop, t3 = token_model._loop([]), model.t3
    expected = decode(loop, requests(model, [(6, 6)]))
    kept = t3.speech_emb.weight.data
    try:
        t3.speech_emb.weight.data = kept.flip(0)
        other = decode(loop, requests(model, [(6, 6)]))
    finally:
        t3.speech_emb.weight.data = kept
    assert other != expected and decode(loop, requests(model, [(6, 6)])) == expected
