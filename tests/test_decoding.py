"""The token loop: guidance off, limits that speak up, progress, faults in the middle, several requests."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import TEXT, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import DecodingError, InvalidRequestError, SpeechTruncatedWarning, UnavailablePassError
from chatterbox_turbo.measure.fidelity import compare, sample, snr_db
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.t3.backbone import StaticBackbone, TransformersBackbone
from chatterbox_turbo.runtime.t3.requests import GUIDED, UNGUIDED, Request, Vocabulary
from chatterbox_turbo.runtime.t3.sampling import SamplingParameters
from chatterbox_turbo.runtime.t3.step_choice import choose_step
from chatterbox_turbo.runtime.t3.token_loop import Loop
from chatterbox_turbo.upstream import t3 as upstream_t3
from chatterbox_turbo.upstream import t3_weights

QUIET = {"decoding": {"progress": "off"}}
EXACT = {"preset": "exact", "decoding": {"progress": "off", "backbone": "upstream"}}
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
    for comparison in compare(models(family), EXACT, [request], seeds=(0, 1)):
        assert comparison.broken("exact") == ""
    if family == "turbo" and knobs["temperature"] == 0.0:
        return  # greedy on the static backbone; upstream draws as at 1.0
    for comparison in compare(models(family), QUIET, [request], seeds=(0, 1)):
        assert comparison.broken("numerical") == ""


def test_english_without_guidance_works_and_uses_one_row(english):
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        speak(english, cfg_weight=0.0)  # upstream
    rows = []
    hook = english.t3.speech_head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape))
    try:
        turbo.apply(english, EXACT)
        wav = speak(english, cfg_weight=0.0)
    finally:
        hook.remove()
    assert torch.isfinite(wav).all() and wav.abs().max() > 0
    assert {shape[:2] for shape in rows} == {(1, 1)}
    expected = sample(english, 0, {"text": TEXT, "cfg_weight": 0.0})
    turbo.apply(english, QUIET)
    assert torch.equal(sample(english, 0, {"text": TEXT, "cfg_weight": 0.0}).tokens, expected.tokens)


def test_the_head_sees_the_last_position_only(english):
    shapes = {"upstream": [], "ours": []}
    for name, config in (("upstream", {"decoding": {"enabled": False}}), ("ours", EXACT)):
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
    assert snr_db(speak(english), expected) > 60


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


def requests(model, lengths, **knobs):
    """Requests of (text length, tokens at most) with a generator each, over the voice that the model has."""
    made = []
    for number, (length, limit) in enumerate(lengths):
        text = torch.tensor([[255, *range(5, 5 + length), 0]])
        with torch.inference_mode():
            embeds, start = upstream_t3.prefix(model.t3, model.conds.t3, text, cfg_weight=0.0)
        parameters = SamplingParameters(**{"temperature": 0.8 + 0.1 * number, **knobs})
        generator = torch.Generator().manual_seed(length)
        made.append(Request(embeds, parameters, limit, (start, length + 2), generator))
    return made


def static_backbone(t3, kernel="torch"):
    return StaticBackbone(*step_for(t3_weights.read(t3), kernel))


def step_for(weights, kernel):
    return weights, choose_step(weights, (), kernel, graphs=False)[0]


def transformers_backbone(t3):
    return TransformersBackbone(upstream_t3.backbone(t3), upstream_t3.head(t3))


BACKBONES = {
    "transformers": transformers_backbone,
    "torch": static_backbone,
    "numba": lambda t3: static_backbone(t3, "numba"),
}


@pytest.fixture
def fused(english):
    """A model whose weights the static backbone can read, put back afterwards."""
    journal = Journal()
    t3_weights.fuse(english.t3, journal)
    yield english
    journal.undo()


def loop(model, name, stop=10**6, **options):
    vocabulary = Vocabulary(6561, stop, lambda ids, at: upstream_t3.embed_tokens(model.t3, ids, at))
    return Loop(BACKBONES[name](model.t3), GUIDED, vocabulary, **options)


def decode(made, running, slots=None):
    ids = {number: [] for number in range(len(made))}
    ends = {}
    for token in running.generate(made, slots):
        assert token.index == len(ids[token.request]) and token.request not in ends
        if token.id is not None:
            ids[token.request].append(token.id)
        if token.end is not None:
            ends[token.request] = token.end
    return ids, ends


LENGTHS = [(4, 5), (9, 12), (2, 8), (6, 3), (7, 9)]


@pytest.mark.parametrize("slots", [None, 1, 2, 3])
@pytest.mark.parametrize("name", BACKBONES)
def test_each_of_several_requests_gets_the_tokens_that_it_gets_alone(fused, name, slots):
    """Whatever else runs, waits, ends and takes its place."""
    running = loop(fused, name)
    together, ends = decode(requests(fused, LENGTHS), running, slots)
    assert [len(together[n]) for n in range(5)] == [limit for _, limit in LENGTHS]
    assert set(ends.values()) == {"limit"}
    for number in range(5):
        alone, _ = decode(requests(fused, LENGTHS)[number : number + 1], running)
        assert alone[0] == together[number]


@pytest.mark.parametrize("name", BACKBONES)
def test_tokens_of_a_stop_end_one_request_and_no_other(fused, name):
    expected, _ = decode(requests(fused, LENGTHS), loop(fused, name))
    stop = expected[1][6]
    ids, ends = decode(requests(fused, LENGTHS), loop(fused, name, stop))
    for number, row in expected.items():
        cut = row[: row.index(stop) + 1] if stop in row else row
        assert ids[number] == cut and ends[number] == ("stop" if stop in row else "limit")


@pytest.mark.parametrize("lag", [1, 3, 20])
def test_a_device_that_runs_ahead_gives_the_same_tokens_and_leaves_the_same_random_numbers(fused, lag):
    at_once, _ = decode(requests(fused, LENGTHS), loop(fused, "torch"))
    stop = at_once[1][4]
    for options in ({}, {"slots": 2}):
        generators, results = [], []
        for steps in (0, lag):
            made = requests(fused, LENGTHS)
            results.append(decode(made, loop(fused, "torch", stop, lag=steps), **options))
            generators.append([request.generator.get_state() for request in made])
        assert results[0] == results[1]
        assert all(torch.equal(a, b) for a, b in zip(*generators, strict=True))


@pytest.mark.parametrize("lag", [0, 3])
def test_the_global_generator_is_left_as_after_the_last_token(fused, lag):
    def draw(steps, stop):
        (request,) = requests(fused, [(9, 12)])
        request.generator = None
        torch.manual_seed(5)
        ids, _ = decode([request], loop(fused, "torch", stop, lag=steps))
        return ids[0], torch.rand(1)

    expected, _ = draw(0, 10**6)
    stop = expected[5]
    assert draw(lag, stop)[1] == draw(0, stop)[1] and draw(0, stop)[1] != draw(0, 10**6)[1]


def test_no_requests_give_no_tokens(fused):
    assert decode([], loop(fused, "torch")) == ({}, {})


@pytest.mark.parametrize("name", BACKBONES)
def test_an_abandoned_loop_stops_and_the_next_one_is_right(fused, name):
    running = loop(fused, name)
    expected, _ = decode(requests(fused, LENGTHS), running)
    tokens = running.generate(requests(fused, [(4, 50)]))
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    tokens.close()
    with pytest.raises(StopIteration):
        next(tokens)
    assert decode(requests(fused, LENGTHS), running)[0] == expected


def test_logits_that_are_not_numbers_name_step_and_request(fused):
    class Broken:
        """The torch step, until one row of one step is not a number."""

        captured = False

        def __init__(self, step):
            self.step, self.calls = step, 0

        def __call__(self, cache, embeds):
            logits, attention = self.step(cache, embeds)
            self.calls += 1
            if self.calls == 3:
                logits = logits.clone()
                logits[1, 7] = float("nan")
            return logits, attention

    running = loop(fused, "torch")
    running.backbone._step = Broken(running.backbone._step)
    with pytest.raises(DecodingError, match="step 3 of request 1"):
        decode(requests(fused, LENGTHS[:2]), running)


def test_an_exhausted_request_ends_without_a_token_where_the_family_says_so(fused):
    class Constraint:
        """Excludes every id after three tokens."""

        def __init__(self):
            self.steps = 0

        def begin(self, requests): ...
        def admit(self, start, length): ...
        def observe(self, attention): ...
        def leave(self, number): ...
        def reasons(self):
            return torch.zeros(1, dtype=torch.long)

        def constrain(self, logits, previous):
            self.steps += 1
            return logits if self.steps < 4 else torch.full_like(logits, -float("inf"))

    running = loop(fused, "torch", constraint=Constraint())
    running.procedure = UNGUIDED
    tokens = list(running.generate(requests(fused, [(4, 50)])))
    assert [t.end for t in tokens] == [None, None, None, "exhausted"] and tokens[-1].id is None
    with pytest.raises(DecodingError, match="Every id is excluded"):
        list(loop(fused, "torch", constraint=Constraint()).generate(requests(fused, [(4, 50)])))
