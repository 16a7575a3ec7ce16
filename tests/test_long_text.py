"""Texts that are too long to be said at once."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import SPEAKING

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError, RunawayWarning
from chatterbox_turbo.speech import long_text
from chatterbox_turbo.speech.long_text import LongText, Spoken, joined, loudness, repeats
from chatterbox_turbo.text import split

QUIET = {"decoding": {"progress": "off", "kernel": "torch"}}
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Is it two, or three?",
    "One day there will be more of them.",
]
LONG = " ".join(SENTENCES * 14)


def given(model, **more):
    return {"language_id": "en", **more} if "Multilingual" in type(model).__name__ else more


def reader(model):
    return LongText(model.turbo._pipeline)


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """Tiny models with random weights end where they were told to, not where their text ends."""
    monkeypatch.setattr(long_text, "MISSING", 0.0)


@pytest.mark.parametrize("model", SPEAKING, indirect=True)
def test_generate_says_a_text_of_any_length(model):
    turbo.apply(model, {**QUIET, "text": {"target": 10.0}})
    parts = reader(model).cut([LONG], "en")
    assert len(parts) > 5 and sum(part.tokens for part in parts) > 1000
    own = model.conds
    torch.manual_seed(3)
    wav = model.generate(LONG, **given(model))
    assert wav.dim() == 2 and wav.dtype == torch.float32 and not wav.is_inference() and model.conds is own
    pauses = sum(int(part.pause * model.sr) for part in parts)
    assert wav.size(1) > pauses + len(parts) * 960 * 5
    assert model.watermarker.get_watermark(wav[0].numpy(), sample_rate=model.sr).mean() > 0.9
    torch.manual_seed(3)
    assert torch.equal(model.generate(LONG, **given(model)), wav)
    torch.manual_seed(4)
    assert not torch.equal(model.generate(LONG, **given(model))[:, :5000], wav[:, :5000])


def test_pieces_are_what_they_are_alone_and_in_order(english):
    turbo.apply(english, QUIET)
    pipeline = english.turbo._pipeline
    parts = split(LONG, "en", target=8.0)
    asked = pipeline.stages.bind((LONG,), {})
    said = list(reader(english).say(parts, asked, english.conds, seed=40))
    assert [one.piece for one in said] == parts
    for number in (0, len(parts) - 1):
        torch.manual_seed(40 + number)
        with turbo.optimized(english, {**QUIET, "watermark": {"enabled": False}}):
            alone = english.turbo._pipeline.utterance(0, {"text": parts[number].text, "seed": 40 + number})
            english.turbo._pipeline.decode([alone])
        assert said[number].tokens == alone.tokens.size(-1)


def test_a_batch_says_long_texts_as_generate_does(english):
    turbo.apply(english, {**QUIET, "text": {"retries": 0}})
    torch.manual_seed(6)
    alone = english.generate(LONG)
    items = [{"text": LONG, "seed": 6}, {"text": SENTENCES[0], "seed": 7}, {"text": LONG, "cfg_weight": "x"}]
    results = dict(english.turbo.as_completed(items))
    assert torch.equal(results[0], alone) and results[1].size(1) < alone.size(1) / 4
    assert isinstance(results[2], Exception)


def test_a_text_that_can_be_said_at_once_is_upstreams(english):
    text = SENTENCES[0]
    turbo.apply(english, {"preset": "exact", **QUIET})
    assert english.turbo.plan.step("text").status == "off"
    torch.manual_seed(5)
    expected = english.generate(text)
    turbo.apply(english, {"preset": "exact", "text": {"enabled": True}, **QUIET})
    assert english.turbo.plan.step("text").status == "on"
    torch.manual_seed(5)
    assert torch.equal(english.generate(text), expected)


def test_numbers_are_spoken_as_words_where_that_is_asked_for(english, monkeypatch):
    heard = []
    stages = type(english.turbo._pipeline.stages) if hasattr(english, "turbo") else None
    turbo.apply(english, {"fidelity": "lossy", "text": {"normalize": True}, **QUIET})
    stages = type(english.turbo._pipeline.stages)
    ask = stages.ask
    monkeypatch.setattr(
        stages, "ask", lambda self, given, voice: heard.append(given["text"]) or ask(self, given, voice)
    )
    english.generate("I have 3 cats.")
    assert heard == ["I have three cats."]
    with pytest.raises(InvalidRequestError, match="nothing that can be said"):
        english.generate("🙂 …")


def test_a_piece_that_goes_wrong_is_said_again_and_told(english, monkeypatch):
    turbo.apply(english, {**QUIET, "text": {"retries": 2}})
    pipeline, parts = english.turbo._pipeline, split(LONG, "en", target=8.0)[:3]
    asked, wrong = pipeline.stages.bind((LONG,), {}), []

    def first_of_the_second(tokens):
        if not wrong:
            wrong.append(len(tokens))
            return True
        return False

    monkeypatch.setattr(long_text, "repeats", first_of_the_second)
    with pytest.warns(RunawayWarning, match=r"is right now \(repetition\)"):
        said = list(reader(english).say(parts, asked, english.conds, seed=1))
    assert [one.attempts for one in said] == [2, 1, 1] and said[0].faults == ["repetition"]
    monkeypatch.setattr(long_text, "repeats", lambda tokens: True)
    with pytest.warns(RunawayWarning, match="was kept as it is"):
        said = list(reader(english).say(parts[:1], asked, english.conds, seed=1))
    assert said[0].attempts == 3 and said[0].faults == ["repetition"] * 3


def test_a_piece_that_reaches_its_limit_is_cut_again(english, monkeypatch):
    turbo.apply(english, {**QUIET, "text": {"retries": 1, "pauses": {"word": 0.123}}})
    pipeline, (part, *_) = english.turbo._pipeline, split(LONG, "en", target=12.0, longest=18.0)
    part = replace(part, start=part.start + 1000, end=part.end + 1000, paragraph=5, chapter=2)
    assert len(part.sentences) > 1
    monkeypatch.setattr(long_text, "LOOSE", 0.0)
    monkeypatch.setattr(long_text, "SLACK", 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = list(reader(english).say([part], pipeline.stages.bind((LONG,), {}), english.conds, seed=1))
    assert len(said) > 1 and "".join(one.piece.text for one in said).replace(" ", "") == part.text.replace(" ", "")
    assert said[-1].piece.pause == part.pause and said[0].piece.pause == 0.123
    assert said[0].piece.start == part.start and said[-1].piece.end == part.end
    assert all(a.piece.end == b.piece.start for a, b in pairwise(said))
    assert {(one.piece.chapter, one.piece.paragraph) for one in said} == {(2, 5)}
    assert any("cut into" in str(one.message) for one in caught if one.category is RunawayWarning)


def test_repetition_is_a_short_run_again_and_again():
    speech = torch.randint(6561, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    assert not repeats(speech) and not repeats([]) and not repeats([5] * 9)
    for period in (1, 3, 8):
        assert repeats(speech + speech[:period] * 10)
    assert not repeats(speech[:10] * 10)


def test_joins_have_no_clicks_and_pieces_are_level():
    piece = split("One. Two.", "en", target=0.5, longest=1.0, shortest=0.0)[0]
    rate, generator = 24_000, torch.Generator().manual_seed(1)
    volumes = [0.1, 0.13, 0.08, 0.1, 0.12]
    spoken = [Spoken(piece, volume * torch.randn(rate, generator=generator), 25) for volume in volumes]
    plain, level = (list(joined(spoken, rate, on)) for on in (False, True))
    pauses = [block for block in plain if not block.any()]
    assert len(pauses) == len(volumes) and len(pauses[0]) == int(piece.pause * rate)
    for blocks in (plain, level):
        for block in blocks:
            assert block[-1].abs() < 1e-3

    def spread(blocks):
        values = [loudness(block, rate) for block in blocks if block.any()]
        return max(values) - min(values)

    assert spread(plain) > 4.0 and spread(level) < 2.5
    assert all(block.abs().max() <= 1.0 for block in joined([Spoken(piece, torch.ones(rate), 25)], rate))


def test_nothing_to_say_is_told(english):
    turbo.apply(english, QUIET)
    with pytest.raises(InvalidRequestError, match="nothing that can be said"):
        reader(english).cut(["  🙂  "], "en")


def test_parts_of_a_piece_that_are_right_are_not_told_as_faulty(english, monkeypatch):
    """Cut once, and said well then: as a piece that was right at its second attempt."""
    turbo.apply(english, {**QUIET, "text": {"retries": 1}})
    pipeline, (part, *_) = english.turbo._pipeline, split(LONG, "en", target=12.0, longest=18.0)
    limits = iter([0.0])
    own = long_text._Try.begin

    def short_at_first(one, *arguments):
        monkeypatch.setattr(long_text, "LOOSE", next(limits, 3.0))
        monkeypatch.setattr(long_text, "SLACK", 6 if long_text.LOOSE == 0 else 75)
        own(one, *arguments)

    monkeypatch.setattr(long_text._Try, "begin", short_at_first)
    with pytest.warns(RunawayWarning, match="is right now .*cut into"):
        said = list(reader(english).say([part], pipeline.stages.bind((LONG,), {}), english.conds, seed=1))
    assert len(said) > 1 and all(len(one.faults) < one.attempts for one in said)


def test_a_budget_bounds_the_pieces_that_are_said_at_once(english, monkeypatch):
    turbo.apply(english, {**QUIET, "memory_budget": "8GB", "budget_slots": 2})
    pipeline, seen = english.turbo._pipeline, []
    decode, sound = pipeline.decode, pipeline.sound
    monkeypatch.setattr(pipeline, "decode", lambda some, slots, **k: seen.append(slots) or decode(some, slots, **k))
    monkeypatch.setattr(pipeline, "sound", lambda some: seen.append(len(some)) or sound(some))
    said = reader(english).say(split(LONG, "en", target=6.0)[:5], pipeline.stages.bind((LONG,), {}), english.conds, 1)
    assert len(list(said)) == 5 and max(seen) == 2
