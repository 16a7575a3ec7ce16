"""Each sampling function against the processor of Transformers that upstream uses, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as hf

from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.runtime.t3 import sampling
from chatterbox_turbo.runtime.t3.sampling import Knobs, SamplingParameters

VOCABULARY = 8194


def logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.1 * 3 ** (seed % 5)
    values = torch.randn(1, VOCABULARY, generator=generator) * scale
    if seed % 3 == 0:
        values[:, ::7] = -float("inf")
    if seed % 4 == 0:
        values = values.round(decimals=1)  # ties
    return values


def knobs(dtype=torch.float32, **values) -> Knobs:
    """The tensors of one request with logits of a format; what is not given is off."""
    off = {"temperature": 1.0, "repetition_penalty": 1.0}
    return Knobs([SamplingParameters(**{**off, **values})], dtype, torch.device("cpu"))


def draw(x, generators, greedy=()) -> torch.Tensor:
    """Random numbers for as many rows as there are generators."""
    noise = torch.ones_like(x)
    sampling.fill_noise(noise, generators, greedy)
    return noise


def keep_min_p(x, value):
    return sampling.keep_min_p(x, knobs(x.dtype, min_p=value).min_p)


def keep_top_k(x, value):
    return sampling.keep_top_k(x, knobs(x.dtype, top_k=value).top_k, value)


def keep_top_p(x, value):
    return sampling.keep_top_p(x, knobs(x.dtype, top_p=value).tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(20))
def test_filters_equal_the_processors_of_transformers(seed, dtype):
    """In half precision too, where a model is cast: upstream's knobs are numbers of Python, which are not rounded."""
    x = logits(seed).to(dtype)
    history = torch.randint(0, VOCABULARY, (1, 1 + 30 * seed), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros_like(x, dtype=torch.bool).scatter_(1, history, True)
    for penalty in (0.7, 1.0, 1.2, 2.0):
        ours = sampling.penalize_repetition(x, seen, knobs(dtype, repetition_penalty=penalty).penalty)
        assert torch.equal(ours, hf.RepetitionPenaltyLogitsProcessor(penalty)(history, x))
    for temperature in (0.3, 0.8, 1.7):
        ours = sampling.divide(x, knobs(dtype, temperature=temperature).temperature)
        assert torch.equal(ours, hf.TemperatureLogitsWarper(temperature)(history, x))
    for min_p in (0.0, 0.02, 0.05, 0.5, 1.0):
        assert torch.equal(keep_min_p(x, min_p), hf.MinPLogitsWarper(min_p=min_p)(history, x))
    for top_k in (1, 5, 1000, VOCABULARY + 5):
        assert torch.equal(keep_top_k(x, top_k), hf.TopKLogitsWarper(top_k)(history, x))
    for top_p in (0.0, 0.3, 0.95):
        assert torch.equal(keep_top_p(x, top_p), hf.TopPLogitsWarper(top_p=top_p)(history, x))


@pytest.mark.parametrize("seed", range(6))
def test_requests_with_other_knobs_in_one_batch_change_nothing(seed):
    """Row by row what each gets alone, for both orders of filters."""
    table = [
        SamplingParameters(0.8, 1.2, 0.05, 1.0, 0, 0.5),
        SamplingParameters(1.0, 1.0, 0.0, 0.9, 50, 0.3),
        SamplingParameters(1.6, 2.0, 0.3, 1.0, 1000, 1.0),
        SamplingParameters(0.5, 1.1, 0.0, 0.4, 0, 0.0),
    ]
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(4, 2, VOCABULARY, generator=generator) * 3
    seen = torch.rand(4, VOCABULARY, generator=generator) < 0.01
    together = Knobs(table, torch.float32, torch.device("cpu"))
    for order in (sampling.filter_guided, sampling.filter_unguided):
        guided = sampling.guide(pair, together.guidance)
        filtered = order(guided, seen, together)
        ours, _ = sampling.sample(
            filtered, together, draw(filtered, [torch.Generator().manual_seed(n) for n in range(4)])
        )
        for n, parameters in enumerate(table):
            alone = Knobs([parameters], torch.float32, torch.device("cpu"))
            assert torch.equal(sampling.guide(pair[n : n + 1], alone.guidance), guided[n : n + 1])
            row = order(guided[n : n + 1], seen[n : n + 1], alone)
            assert torch.equal(torch.softmax(row, -1), torch.softmax(filtered[n : n + 1], -1))
            token, _ = sampling.sample(row, alone, draw(row, [torch.Generator().manual_seed(n)]))
            assert torch.equal(token, ours[n : n + 1])


@pytest.mark.parametrize("seed", range(20))
def test_drawing_equals_multinomial_and_takes_as_many_random_numbers(seed):
    probabilities = torch.softmax(logits(seed), -1)
    torch.manual_seed(seed)
    expected, after = torch.multinomial(probabilities, 1), torch.rand(1)
    torch.manual_seed(seed)
    ours = sampling.draw(probabilities, draw(probabilities, [None]))
    assert torch.equal(ours, expected) and torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("seed", range(20))
def test_leaving_top_p_out_at_one_changes_no_probability(seed):
    x = keep_min_p(logits(seed), 0.05 if seed % 2 else 0.0)
    filtered = hf.TopPLogitsWarper(top_p=1.0)(None, x)
    assert torch.equal(torch.softmax(x, -1), torch.softmax(filtered, -1))
    assert torch.equal(sampling.filter_guided(x, torch.zeros_like(x, dtype=torch.bool), knobs(temperature=1.0)), x)


def test_filters_remove_something():
    x = logits(1)
    assert torch.isinf(keep_min_p(x, 0.5)).any()
    assert torch.isinf(keep_top_k(x, 5)).sum() == VOCABULARY - 5
    assert torch.isinf(keep_top_p(x, 0.3)).any()


def test_guidance_mixes_two_rows_and_passes_one_through():
    rows = torch.tensor([[[1.0, 2.0], [0.5, 4.0]]])
    weight = knobs(guidance=0.5).guidance
    assert torch.equal(sampling.guide(rows, weight), torch.tensor([[1.25, 1.0]]))
    assert torch.equal(sampling.guide(rows[:, :1], weight), rows[:, 0])


def test_temperature_zero_is_greedy_and_draws_nothing():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    x = torch.tensor([[0.1, 3.0, 2.0]])
    greedy = knobs(temperature=0.0)
    token, status = sampling.sample(x, greedy, draw(x, [None], greedy.greedy))
    assert (token.tolist(), status.tolist()) == ([[1]], [[sampling.DRAWN]])
    assert torch.equal(torch.random.get_rng_state(), state)
    both = Knobs([SamplingParameters(0.0), SamplingParameters(1.0)], torch.float32, torch.device("cpu"))
    two = torch.cat([x, x])
    tokens, _ = sampling.sample(two, both, draw(two, [None, torch.Generator().manual_seed(3)], both.greedy))
    assert tokens[0].item() == 1 and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "row, status",
    [
        ([-float("inf")] * 3, sampling.EXHAUSTED),
        ([0.0, float("nan"), 1.0], sampling.IMPOSSIBLE),
        ([0.0, float("inf"), 1.0], sampling.IMPOSSIBLE),
        ([0.0, -float("inf"), 1.0], sampling.DRAWN),
    ],
)
def test_what_cannot_be_drawn_is_told_by_the_status_of_its_row_alone(row, status):
    x = torch.tensor([[0.0, 1.0, 2.0], row])
    both = Knobs([SamplingParameters()] * 2, torch.float32, torch.device("cpu"))
    assert sampling.sample(x, both, draw(x, [None, None]))[1].tolist() == [[sampling.DRAWN], [status]]


@pytest.mark.parametrize(
    "knob",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"repetition_penalty": 0.0},
        {"min_p": 1.5},
        {"top_p": -1.0},
    ],
)
def test_knobs_out_of_range_are_refused(knob):
    with pytest.raises(InvalidRequestError, match=f"{next(iter(knob))} is .* must be"):
        SamplingParameters(**knob)
