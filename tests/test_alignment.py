"""The multilingual analyzer: upstream leaks and switches for good; the pass does neither, with equal tokens."""

from __future__ import annotations

import pytest
import torch
from cases import NO_ANALYZER, count_hooks, has_analyzer, speak

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import compare_tokens, sample
from chatterbox_turbo.upstream.alignment import analyzer_hooks

pytestmark = pytest.mark.skipif(not has_analyzer(), reason=NO_ANALYZER)

# the static backbone has no hooks to leave
QUIET = {"preset": "exact", "decoding": {"progress": "off", "backbone": "upstream"}}
ALONE = {"decoding": {"enabled": False}}  # upstream's own token loop inside the pass
REQUEST = {"text": "A sentence of a certain length.", "language_id": "en"}


@pytest.fixture(scope="module")
def fresh():
    """A model whose process has never generated: made anew, because upstream's first call changes it for good."""
    return build()


def build():
    return synthetic.build("multilingual", "tiny", stop_after=12, seed=5)


def switches(model):
    return {k: v for k, v in vars(model.t3.tfmr.config).items() if "attn_implementation" in k or "output_att" in k}


def short_call(model):
    """T3 alone, four tokens."""
    text = torch.tensor([[255, 10, 11, 12, 13, 14, 15, 0]]).repeat(2, 1)
    return model.t3.inference(t3_cond=model.conds.t3, text_tokens=text, max_new_tokens=4)


@pytest.mark.filterwarnings("ignore::chatterbox_turbo.errors.SpeechTruncatedWarning")
def test_many_calls_leave_no_hook_and_no_switch(fresh):
    """Counts are equal, so that a hook in any one call would tell."""
    hooks, before = count_hooks(fresh.t3), switches(fresh)
    with turbo.optimized(fresh, QUIET):
        first = sample(fresh, 3, REQUEST)
        for _ in range(10):
            short_call(fresh)
        last = sample(fresh, 3, REQUEST)
        assert (count_hooks(fresh.t3), switches(fresh)) == (hooks, before)
    assert torch.equal(first.tokens, last.tokens) and torch.equal(first.wav, last.wav)
    with turbo.optimized(fresh, {"decoding": {"progress": "off", "backbone": "static"}}):
        assert torch.equal(sample(fresh, 3, REQUEST).tokens, first.tokens)
        assert (count_hooks(fresh.t3), switches(fresh)) == (hooks, before)


def test_upstreams_own_loop_is_contained_too(fresh):
    """Without the decoding pass Transformers adds capturing hooks, once; the analyzer's do not stay."""
    before = switches(fresh)
    with turbo.optimized(fresh, ALONE):
        first = sample(fresh, 3, REQUEST)
        hooks = count_hooks(fresh.t3)
        for _ in range(5):
            short_call(fresh)
        last = sample(fresh, 3, REQUEST)
        assert (count_hooks(fresh.t3), analyzer_hooks(fresh.t3.tfmr), switches(fresh)) == (hooks, [], before)
    assert torch.equal(first.tokens, last.tokens) and torch.equal(first.wav, last.wav)


@pytest.mark.parametrize("speak", ["batch", "stream"])
def test_batches_and_streams_on_upstreams_backbone_leave_nothing(fresh, speak):
    before, hooks = switches(fresh), count_hooks(fresh.t3)
    items = [{"text": text, "language_id": "en"} for text in ("One.", "Two.")]
    with turbo.optimized(fresh, {"preset": "exact", "decoding": {"progress": "off"}}):
        if speak == "batch":
            fresh.turbo.batch(items)
        else:
            list(fresh.turbo.stream("One.", language_id="en"))
        assert (analyzer_hooks(fresh.t3.tfmr), switches(fresh)) == ([], before)
    assert (count_hooks(fresh.t3), switches(fresh)) == (hooks, before)


def test_tokens_equal_upstreams_first_call_and_upstream_pollutes_its_second():
    ours, theirs = (build() for _ in range(2))
    turbo.apply(ours, QUIET)
    hooks, untouched = count_hooks(theirs.t3), switches(theirs)
    seeds = (3, 4)
    upstream = [sample(theirs, seed, REQUEST) for seed in seeds]
    optimized = [sample(ours, seed, REQUEST) for seed in seeds]

    assert [compare_tokens(a.tokens, b.tokens) for a, b in zip(optimized, upstream, strict=True)] == [(1.0, None)] * 2
    assert all(torch.equal(a.wav, b.wav) for a, b in zip(optimized, upstream, strict=True))

    leaked = count_hooks(theirs.t3) - hooks
    assert leaked >= 2 * 3 and len(analyzer_hooks(theirs.t3.tfmr)) == 2 * 3, "upstream no longer leaks its hooks"
    assert switches(theirs) != untouched, "upstream no longer switches attention for good"
    assert (len(analyzer_hooks(ours.t3.tfmr)), switches(ours)) == (0, untouched)


def test_an_interrupted_call_leaves_nothing_either(fresh):
    class Stop(Exception):
        pass

    def stop(count, limit):
        if count == 3:
            raise Stop

    hooks, before = count_hooks(fresh.t3), switches(fresh)
    with turbo.optimized(fresh, QUIET):
        expected = sample(fresh, 3, REQUEST)
        with pytest.raises(Stop), turbo.optimized(fresh, {"decoding": {"progress": stop, "backbone": "upstream"}}):
            speak(fresh)
        assert count_hooks(fresh.t3) == hooks
        assert torch.equal(sample(fresh, 3, REQUEST).wav, expected.wav)
    assert (count_hooks(fresh.t3), switches(fresh)) == (hooks, before)


def test_hooks_of_calls_before_apply_are_taken_out_and_put_back():
    model = build()
    speak(model)
    speak(model)
    before = analyzer_hooks(model.t3.tfmr)
    order = {id(m): list(m._forward_hooks) for m, _ in before}
    assert len(before) == 6
    turbo.apply(model, QUIET)
    assert analyzer_hooks(model.t3.tfmr) == []
    assert "took out 6 hooks" in model.turbo.plan.step("alignment").reason
    turbo.revert(model)
    assert analyzer_hooks(model.t3.tfmr) == before
    assert {id(m): list(m._forward_hooks) for m, _ in before} == order
