"""The way through attention that is noisy, rests, goes back, looks elsewhere, or ends too early."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest

from chatterbox_turbo.runtime.t3 import alignment_path
from chatterbox_turbo.runtime.t3.alignment_path import boundaries


def drawn(durations, seed=0, noise=0.03):
    """Attention (T, S) of a reading in which text token s takes durations[s] steps."""
    generator = np.random.default_rng(seed)
    steps = np.repeat(np.arange(len(durations)), durations)
    attention = noise * generator.random((len(steps), len(durations)))
    attention[np.arange(len(steps)), steps] += generator.uniform(0.1, 0.5, len(steps))
    return attention


def reading(seed, tokens=80):
    """Steps of each text token: one or two of most, none of some, and pauses."""
    generator = np.random.default_rng(seed)
    durations = generator.choice([0, 1, 2, 3, 25], tokens, p=[0.15, 0.35, 0.3, 0.17, 0.03])
    durations[0] = 1
    return durations


def edges(durations):
    return np.concatenate([[0], np.cumsum(durations)])


@pytest.mark.parametrize("seed", range(5))
def test_noise_skipped_tokens_and_plateaus(seed):
    durations = reading(seed)
    error = np.abs(boundaries(drawn(durations, seed)) - edges(durations))
    assert error.max() < 2.0 and error.mean() < 0.25


def test_what_shares_a_step_has_equal_parts_of_it():
    assert boundaries(drawn([2, 0, 0, 3], noise=0)).tolist() == pytest.approx([0, 2, 2 + 1 / 3, 2 + 2 / 3, 5])


def test_going_back_after_the_end_prolongs_the_end():
    durations = np.full(30, 2)
    attention = np.concatenate([drawn(durations), drawn(durations)[20:40]])
    error = np.abs(boundaries(attention)[:-1] - edges(durations)[:-1])
    assert error.max() <= 1.0 and boundaries(attention)[-1] == 80


def test_a_phrase_that_is_said_twice_moves_nothing_beyond_it():
    durations = np.full(30, 2)
    once = drawn(durations)
    found = boundaries(np.concatenate([once[:40], once[24:40], once[40:]]))
    assert np.abs(found[:12] - edges(durations)[:12]).max() <= 1.0
    assert np.abs(found[21:] - edges(durations)[21:] - 16).max() <= 1.0


def test_steps_that_look_elsewhere_are_passed_over():
    """At text far ahead, at nothing, and evenly at all of it."""
    durations = np.full(40, 2)
    attention = drawn(durations)
    attention[20:23] = drawn(durations, 1)[70:73]
    attention[40:44] = 0.0
    attention[60:64] = 1 / 40
    error = np.abs(boundaries(attention) - edges(durations))
    assert error.max() <= 4.0 and error[[0, 9, 13, 19, 23, 29, 33, 40]].max() <= 1.0


def test_steps_that_hardly_look_at_the_text_have_no_vote():
    """A pause, in which next to nothing is on the text, though far more on one token than on the others."""
    durations = np.full(30, 2)
    durations[10] = 22
    attention = drawn(durations)
    attention[22:42] = 1e-7
    attention[22:42, 14] = 5e-3
    assert np.abs(boundaries(attention) - edges(durations)).max() <= 1.0


def test_speech_that_was_cut_leaves_the_rest_at_its_end():
    durations = np.full(90, 2)
    attention = drawn(durations)
    found = boundaries(attention[:50])
    assert np.abs(found[:25] - edges(durations)[:25]).max() <= 1.0 and (found[26:] == 50).all()
    last = boundaries(np.concatenate([attention[:49], attention[170:171]]))  # whose last step looks far ahead
    assert (last[26:] == 50).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (200, 3), (5, 90), (400, 60)])
def test_all_of_speech_is_covered_in_order_whatever_attention_is(shape):
    generator = np.random.default_rng(sum(shape))
    for attention in (generator.random(shape) ** 8, np.zeros(shape), np.ones(shape)):
        found = boundaries(attention)
        assert found.shape == (shape[1] + 1,) and found[0] == 0 and found[-1] == shape[0]
        assert (np.diff(found) >= 0).all()


def test_no_way_is_better():
    """Against all ways that go forward."""
    generator = np.random.default_rng(3)
    for _ in range(20):
        attention = generator.random((6, 5)) ** 4
        votes = np.log(np.maximum(attention, alignment_path.FLOOR))

        def price(way, votes=votes):
            passed = sum(max(0, b - a - 1) for a, b in pairwise(way))
            return sum(votes[n, s] for n, s in enumerate(way) if n) - alignment_path.SKIP * passed

        best = max(price((0, *way)) for way in combinations_with_replacement(range(5), 5))
        assert price(tuple(alignment_path._path(attention))) == pytest.approx(best)
