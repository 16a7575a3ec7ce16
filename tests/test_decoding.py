"""The token loop: guidance off, limits that speak up, progress, faults in the middle, several requests."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import TEXT, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import DecodingError, InvalidRequestError, SpeechTruncatedWarning, UnavailablePassError
from chatterbox_turbo.fidelity import compare, sample
from chatterbox_turbo.runtime.backbone import TransformersBackbone
from chatterbox_turbo.runtime.token_loop import Request, generate_tokens
from chatterbox_turbo.upstream import t3 as upstream_t3

QUIET = {"decoding": {"progress": "off"}}
SPEAKING = ("english", "multilingual", "turbo")
KNOBS = {
    "english": [
        {"cfg_weight": 1.0, "temperature": 1.0},
        {"temperature": 1.3, "min_p": 0.0, "top_p": 0.5, "repetition_penalty": 1.0},
        {"exaggeration": 0.9, "min_p": 0.2, "repetition_penalty": 2.0},
    ],
    "multilingual": [{"cfg_weight": 0.0}, {"cfg_weight": 0.3, "language_id": "fr", "top_p": 0.8, "temperature": 1.2}],
    "turbo": [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
        {"temperature": 0.0, "top_k": 5},
        {"temperature": 1.4, "top_k": 50, "top_p": 0.5, "repetition_penalty": 1.5},
    ],
}


@pytest.mark.parametrize("family, knobs", [(f, k) for f, options in KNOBS.items() for k in options])
def test_every_knob_means_what_it_means_upstream(models, family, knobs):
    request = {"text": TEXT, **({"language_id": "en"} if family == "multilingual" else {}), **knobs}
    for comparison in compare(models(family), QUIET, [request], seeds=(0, 1)):
        assert comparison.broken("exact") == ""


def test_english_without_guidance_works_and_uses_one_row(english):
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        speak(english, cfg_weight=0.0)  # upstream
    rows = []
    hook = english.t3.speech_head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape))
    try:
        turbo.apply(english, QUIET)
        wav = speak(english, cfg_weight=0.0)
    finally:
        hook.remove()
    assert torch.isfinite(wav).all() and wav.abs().max() > 0
    assert {shape[:2] for shape in rows} == {(1, 1)}


def test_the_head_sees_the_last_position_only(english):
    shapes = {"upstream": [], "ours": []}
    for name, config in (("upstream", {"decoding": {"enabled": False}}), ("ours", QUIET)):
        hook = english.t3.speech_head.register_forward_pre_hook(lambda m, x, s=shapes[name]: s.append(x[0].size(1)))
        with turbo.optimized(english, config):
            speak(english)
        hook.remove()
    assert max(shapes["upstream"]) > 30 and set(shapes["ours"]) == {1}


@pytest.mark.parametrize("model", SPEAKING, indirect=True)
def test_a_limit_cuts_with_a_warning(model):
    turbo.apply(model, {"decoding": {"max_new_tokens": 6, "progress": "off"}})
    with pytest.warns(SpeechTruncatedWarning, match="cut at 6 tokens"):
        short = sample(model, 0, {"text": TEXT, **({"language_id": "en"} if "Multi" in type(model).__name__ else {})})
    assert short.tokens.size(1) == 6
    turbo.apply(model, QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpeechTruncatedWarning)
        speak(model)


def test_a_limit_beyond_the_positions_is_refused_before_anything_happens(models):
    model = models("turbo")
    capacity = upstream_t3.token_capacity(model.t3)
    if capacity >= 4096:
        pytest.skip("this model has positions for every limit that the configuration allows")
    with pytest.raises(UnavailablePassError, match=f"positions for {capacity}"):
        turbo.apply(model, {"decoding": {"enabled": True, "max_new_tokens": 4096}})


def test_temperature_zero_repeats_itself(english):
    turbo.apply(english, QUIET)
    a, b = (sample(english, seed, {"text": TEXT, "temperature": 0.0}) for seed in (1, 2))
    assert torch.equal(a.tokens, b.tokens)


def test_progress_can_be_a_function_a_bar_or_nothing(english, capsys):
    seen = []
    turbo.apply(english, {"decoding": {"progress": lambda count, limit: seen.append((count, limit))}})
    tokens = sample(english, 0, {"text": TEXT}).tokens.size(1)
    assert seen == [(n, 1000) for n in range(1, tokens + 1)]
    assert "function" in str(english.turbo.report().to_dict()["config"]["decoding"]["progress"])
    capsys.readouterr()
    turbo.apply(english, QUIET)
    speak(english)
    assert "Sampling" not in capsys.readouterr().err
    turbo.apply(english, {"decoding": {"progress": "bar"}})
    speak(english)
    assert "Sampling" in capsys.readouterr().err


def test_an_exception_in_the_middle_leaves_the_next_call_right(english):
    class Stop(Exception):
        pass

    def stop(count, limit):
        if count == 4:
            raise Stop

    expected = speak(english)
    turbo.apply(english, {"decoding": {"progress": stop}})
    with pytest.raises(Stop):
        speak(english)
    turbo.apply(english, QUIET)
    assert torch.equal(speak(english), expected)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_bad_knobs_are_refused_and_the_model_stays_usable(english, arguments, said):
    turbo.apply(english, QUIET)
    with pytest.raises(InvalidRequestError, match=f"{said} is .* must be"):
        speak(english, **arguments)
    assert torch.isfinite(speak(english)).all()


def test_text_without_start_or_with_one_row_is_refused(english):
    turbo.apply(english, QUIET)
    call = english.t3.inference
    with pytest.raises(InvalidRequestError, match="lack start_text_token"):
        call(t3_cond=english.conds.t3, text_tokens=torch.tensor([[5, 6, 0]]), max_new_tokens=3)
    with pytest.raises(InvalidRequestError, match="one row"):
        call(t3_cond=english.conds.t3, text_tokens=torch.tensor([[255, 6, 0]]), max_new_tokens=3, cfg_weight=0.5)
    with pytest.raises(InvalidRequestError, match="at least 1"):
        call(t3_cond=english.conds.t3, text_tokens=torch.tensor([[255, 6, 0]] * 2), max_new_tokens=0)


def test_weights_that_are_not_numbers_are_told_with_the_step(english):
    turbo.apply(english, QUIET)
    weight = english.t3.speech_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(DecodingError, match="step 0"):
            speak(english)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert torch.isfinite(speak(english)).all()


# -- the loop itself, with several requests ------------------------------------------------------------------


def greedy(logits, history):
    return (logits[0:1] - 1e9 * (torch.arange(logits.size(1)) >= 6561)).argmax(-1, keepdim=True)


def requests(model, lengths, choose=greedy):
    t3, made = model.t3, []
    for length, limit in lengths:
        text = torch.tensor([[255, *range(5, 5 + length), 0]])
        with torch.inference_mode():
            embeds, _ = upstream_t3.prefix(t3, model.conds.t3, text, cfg_weight=0.0)
        embed = lambda token, position: upstream_t3.embed_token(t3, token, position, 1)  # noqa: E731
        made.append(Request(embeds, choose, embed, 6561, 6562, limit))
    return made


def decode(model, made):
    backbone = TransformersBackbone(upstream_t3.backbone(model.t3), upstream_t3.head(model.t3))
    ids = {number: [] for number in range(len(made))}
    ends = {}
    for token in generate_tokens(made, backbone):
        ids[token.request].append(int(token.id))
        ends[token.request] = token.end
    return ids, ends


def test_each_of_several_requests_gets_the_tokens_that_it_gets_alone(english):
    lengths = [(4, 5), (9, 12), (2, 8)]
    together, ends = decode(english, requests(english, lengths))
    assert [len(together[n]) for n in range(3)] == [5, 12, 8]
    assert set(ends.values()) == {"limit"}
    for number, length in enumerate(lengths):
        alone, _ = decode(english, requests(english, [length]))
        assert alone[0] == together[number]


def test_no_requests_give_no_tokens(english):
    assert decode(english, []) == ({}, {})


def test_an_abandoned_loop_stops_and_leaves_inference_mode(english):
    backbone = TransformersBackbone(upstream_t3.backbone(english.t3), upstream_t3.head(english.t3))
    tokens = generate_tokens(requests(english, [(4, 50)]), backbone)
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    tokens.close()
    with pytest.raises(StopIteration):
        next(tokens)


def test_an_exhausted_request_ends_without_a_token(english):
    def nothing(logits, history):
        return None if history.size(1) > 3 else greedy(logits, history)

    backbone = TransformersBackbone(upstream_t3.backbone(english.t3), upstream_t3.head(english.t3))
    tokens = list(generate_tokens(requests(english, [(4, 50)], nothing), backbone))
    assert [t.end for t in tokens] == [None, None, None, "exhausted"] and tokens[-1].id is None
