"""Tokens of requests that come and go while others run: each gets what it would get alone."""

from __future__ import annotations

import pytest
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import DecodingError
from chatterbox_turbo.runtime.t3 import kv_cache

TEXTS = ("One.", "The quick brown fox jumps over the lazy dog.", "Is it two, or three?")


def applied(model, preset="auto", **options):
    turbo.apply(model, {"preset": preset, "decoding": {"progress": "off", "kernel": "torch", **options}})
    return model.turbo.token_model


def request(model, text, seed, **options):
    """As ``generate`` would ask T3 for, with a generator of its own."""
    language = {"language_id": "en"} if "Multilingual" in type(model).__name__ else {}
    pipeline = model.turbo._pipeline
    return pipeline.request(pipeline.utterance(0, {"text": text, "seed": seed, **language, **options}))


def alone(model, text, seed, **options):
    (tokens,) = model.turbo.token_model.run([request(model, text, seed, **options)])
    stop = model.t3.hp.stop_speech_token
    return [token for token in tokens[0].tolist() if token != stop]


def spoken(model, ticket):
    return [token for token in ticket.ids if token != model.t3.hp.stop_speech_token]


def step_by_step(service, tickets, by=3):
    while not all(ticket.over for ticket in tickets):
        for ticket in tickets:
            service.advance(ticket, len(ticket.ids) + by)


@pytest.mark.parametrize("model", ["english", "multilingual", "turbo"], indirect=True)
def test_requests_that_join_later_get_what_they_get_alone(model):
    engine = applied(model)
    expected = [alone(model, text, seed) for seed, text in enumerate(TEXTS)]
    service, tickets = engine.service, []
    for seed, text in enumerate(TEXTS):
        tickets.append(service.submit(request(model, text, seed)))
        service.advance(tickets[0], 4 * (seed + 1))
    assert not tickets[-1].over
    step_by_step(service, tickets)
    assert [spoken(model, ticket) for ticket in tickets] == expected
    assert engine.backbone.cache.nbytes == 0, "the cache lies beside the audio"


def test_more_than_there_are_places_for_wait_and_enter_in_order(english):
    engine = applied(english, streams=2)
    expected = [alone(english, text, seed) for seed, text in enumerate(TEXTS)]
    tickets = [engine.service.submit(request(english, text, seed)) for seed, text in enumerate(TEXTS)]
    engine.service.advance(tickets[0], 2)
    assert len(tickets[1].ids) >= 1 and not tickets[2].ids
    engine.service.drain()
    assert [spoken(english, ticket) for ticket in tickets] == expected


def test_one_that_nobody_wants_any_more_leaves_the_others_alone(english):
    engine = applied(english)
    expected = [alone(english, text, seed) for seed, text in enumerate(TEXTS)]
    service = engine.service
    tickets = [service.submit(request(english, text, seed)) for seed, text in enumerate(TEXTS)]
    service.advance(tickets[0], 5)
    service.leave(tickets[0])
    seen = len(tickets[0].ids)
    step_by_step(service, tickets[1:])
    assert len(tickets[0].ids) == seen and tickets[0].over
    assert [spoken(english, ticket) for ticket in tickets[1:]] == expected[1:]
    last = service.submit(request(english, TEXTS[0], 0))
    service.advance(last, 2)
    service.leave(last)
    assert engine.backbone.cache.nbytes == 0 and service._run is None, "kept after the last one has left"


def test_a_call_in_between_has_the_model_to_itself_and_changes_nothing(english):
    engine = applied(english)
    expected = alone(english, TEXTS[1], 1)
    torch.manual_seed(4)
    wav = english.generate("Hello.")
    ticket = engine.service.submit(request(english, TEXTS[1], 1))
    engine.service.advance(ticket, 3)
    torch.manual_seed(4)
    assert torch.equal(english.generate("Hello."), wav)
    assert ticket.over and spoken(english, ticket) == expected


def test_upstreams_backbone_takes_one_after_the_other(english):
    engine = applied(english, preset="exact")
    assert engine.backbone is None
    expected = [alone(english, text, seed) for seed, text in enumerate(TEXTS[:2])]
    tickets = [engine.service.submit(request(english, text, seed)) for seed, text in enumerate(TEXTS[:2])]
    step_by_step(engine.service, tickets)
    assert [spoken(english, ticket) for ticket in tickets] == expected


def test_whoever_waits_is_told_that_the_configuration_has_changed(english):
    engine = applied(english)
    ticket = engine.service.submit(request(english, TEXTS[1], 1))
    engine.service.advance(ticket, 3)
    turbo.revert(english)
    with pytest.raises(DecodingError, match="has changed meanwhile"):
        engine.service.advance(ticket, 9)


def test_an_error_ends_those_that_run_and_the_service_goes_on(english, monkeypatch):
    engine = applied(english)
    expected = alone(english, TEXTS[0], 0)
    ticket = engine.service.submit(request(english, TEXTS[1], 1))
    engine.service.advance(ticket, 3)
    step = engine.backbone.step
    monkeypatch.setattr(engine.backbone, "step", lambda embeds: step(embeds * float("nan")))
    with pytest.raises(DecodingError, match="NaN"):
        engine.service.advance(ticket, 9)
    monkeypatch.undo()
    again = engine.service.submit(request(english, TEXTS[0], 0))
    engine.service.drain()
    assert spoken(english, again) == expected


@pytest.mark.parametrize("where", ["begin", "keys", "values"])
def test_a_batch_that_cannot_begin_tells_those_that_wait(english, monkeypatch, where):
    """Memory that ends before anybody is in the batch, or between the two tensors of its cache."""
    engine, own, left = applied(english), kv_cache.reserve, [1 if where == "keys" else 2]
    expected = alone(english, TEXTS[0], 0)
    if where == "begin":
        monkeypatch.setattr(engine.backbone, "begin", lambda *sizes: (_ for _ in ()).throw(MemoryError("none")))

    def short(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("none")
        return own(*arguments)

    monkeypatch.setattr(kv_cache, "reserve", own if where == "begin" else short)
    tickets = [engine.service.submit(request(english, text, seed)) for seed, text in enumerate(TEXTS[:2])]
    for ticket in tickets:
        with pytest.raises(MemoryError):
            engine.service.advance(ticket, 1)
    monkeypatch.undo()
    again = engine.service.submit(request(english, TEXTS[0], 0))
    engine.service.drain()
    assert spoken(english, again) == expected
