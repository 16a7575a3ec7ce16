"""Each sampling function against the processor of Transformers that upstream uses, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as hf

from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.runtime import sampling
from chatterbox_turbo.runtime.sampling import SamplingParameters

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


@pytest.mark.parametrize("seed", range(20))
def test_filters_equal_the_processors_of_transformers(seed):
    x = logits(seed)
    history = torch.randint(0, VOCABULARY, (1, 1 + 30 * seed), generator=torch.Generator().manual_seed(seed))
    for penalty in (0.7, 1.0, 1.2, 2.0):
        ours = sampling.penalize_repetition(x, history, penalty)
        assert torch.equal(ours, hf.RepetitionPenaltyLogitsProcessor(penalty)(history, x))
    for min_p in (0.0, 0.02, 0.05, 0.5, 1.0):
        assert torch.equal(sampling.keep_min_p(x, min_p), hf.MinPLogitsWarper(min_p=min_p)(history, x))
    for top_k in (1, 5, 1000, VOCABULARY + 5):
        assert torch.equal(sampling.keep_top_k(x, top_k), hf.TopKLogitsWarper(top_k)(history, x))
    for top_p in (0.0, 0.3, 0.95):
        assert torch.equal(sampling.keep_top_p(x, top_p), hf.TopPLogitsWarper(top_p=top_p)(history, x))


@pytest.mark.parametrize("seed", range(20))
def test_leaving_top_p_out_at_one_changes_no_probability(seed):
    x = sampling.keep_min_p(logits(seed), 0.05 if seed % 2 else 0.0)
    filtered = hf.TopPLogitsWarper(top_p=1.0)(None, x)
    assert torch.equal(torch.softmax(x, -1), torch.softmax(filtered, -1))
    assert torch.equal(sampling.keep_top_p(x, 1.0), x)


def test_filters_remove_something():
    x = logits(1)
    assert torch.isinf(sampling.keep_min_p(x, 0.5)).any()
    assert torch.isinf(sampling.keep_top_k(x, 5)).sum() == VOCABULARY - 5
    assert torch.isinf(sampling.keep_top_p(x, 0.3)).any()


def test_guidance_mixes_two_rows_and_passes_one_through():
    rows = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    assert torch.equal(sampling.guide(rows, 0.5), torch.tensor([[1.25, 1.0]]))
    assert sampling.guide(rows[:1], 0.5) is not None
    assert torch.equal(sampling.guide(rows[:1], 0.5), rows[:1])


def test_temperature_zero_is_greedy_and_draws_nothing():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    history = torch.zeros(1, 1, dtype=torch.long)
    token = sampling.sample_guided(torch.tensor([[0.1, 3.0, 2.0]]), history, SamplingParameters(temperature=0.0))
    assert token.tolist() == [[1]] and torch.equal(torch.random.get_rng_state(), state)


def test_nothing_left_is_told_by_none():
    history = torch.zeros(1, 1, dtype=torch.long)
    nothing = torch.full((1, 4), -float("inf"))
    assert sampling.sample_unguided(nothing, history, SamplingParameters()) is None


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
