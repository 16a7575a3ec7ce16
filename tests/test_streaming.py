"""``model.turbo.stream``: the speech of one call, block by block, whoever else speaks and wherever one stops."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch
from cases import SPEAKING

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError, UnavailablePassError
from chatterbox_turbo.measure.fidelity import sample
from chatterbox_turbo.runtime.s3gen.streaming import Windows
from chatterbox_turbo.speech.stream import LOOK, joined
from chatterbox_turbo.text import split
from chatterbox_turbo.upstream.structure import Structure

QUIET = {"decoding": {"progress": "off", "kernel": "torch"}}
TEXT = "The quick brown fox jumps over the lazy dog."
SMALL = Windows(first_chunk=3, chunk=4, growth=1.0, longest_chunk=4)


def given(model, **more):
    return {"language_id": "en", **more} if "Multilingual" in type(model).__name__ else more


def test_a_changed_model_is_noticed_before_a_stream_and_soon_within_it(english, monkeypatch):
    turbo.apply(english, QUIET)
    looks, own = [], Structure.change
    monkeypatch.setattr(Structure, "change", lambda self: looks.append(1) or own(self))
    with english.turbo.stream(TEXT, seed=5, windows=SMALL) as stream:
        for _ in range(8):
            stream.poll(1)
        assert len(looks) == 1
        stream._looked -= LOOK  # as if so much time had passed
        stream.poll(1)
        assert len(looks) == 2
    with english.turbo.stream(TEXT, seed=5, windows=SMALL) as stream:
        next(stream)
        english.t3.tfmr.layers[0].mlp.register_forward_hook(lambda *_: None)
        stream._looked -= LOOK
        with pytest.raises(UnavailablePassError, match="changed while it was streaming"):
            list(stream)
    english.t3.tfmr.layers[0].mlp._forward_hooks.clear()


@pytest.mark.parametrize("model", SPEAKING, indirect=True)
def test_a_stream_says_what_generate_says(model):
    turbo.apply(model, QUIET)
    own = model.conds
    expected = sample(model, 5, {"text": TEXT, **given(model)})
    state = torch.get_rng_state()
    blocks = list(model.turbo.stream(TEXT, seed=5, windows=SMALL, **given(model)))
    assert torch.equal(torch.get_rng_state(), state) and model.conds is own
    wav = joined(blocks)
    assert len(blocks) > 2 and wav.dtype == torch.float32
    assert wav.size(1) == 960 * sum(token < 6561 for token in expected.tokens.flatten().tolist()) + (
        960 * 3 if "Turbo" in type(model).__name__ else 0
    )
    metrics = [one for _, one in blocks]
    assert [one.chunk for one in metrics] == list(range(len(blocks)))
    assert metrics[-1].seconds == pytest.approx(wav.size(1) / 24000)
    assert metrics[0].first_audio == metrics[-1].first_audio > 0 and metrics[0].lead == pytest.approx(0.0, abs=1e-3)
    assert metrics[-1].real_time_factor > 0 and metrics[-1].tokens >= metrics[0].tokens > 0
    again = joined(list(model.turbo.stream(TEXT, seed=5, windows=SMALL, **given(model))))
    assert torch.equal(again, wav), "the same seed"
    assert model.watermarker.get_watermark(wav[0].numpy(), sample_rate=model.sr).mean() > 0.9


def test_voice_conversion_streams_by_blocks(models, voice):
    model = models("vc")
    with turbo.optimized(model):
        whole = model.generate(voice)
        blocks = list(model.turbo.stream(audio=voice, seed=1))
        assert len(blocks) > 1 and abs(joined(blocks).size(1) - whole.size(1)) < 240


def test_several_streams_and_calls_at_once_each_get_their_own(english):
    turbo.apply(english, QUIET)
    texts = ["One.", TEXT, "Is it two, or three?"]
    expected = [joined(list(english.turbo.stream(text, seed=n, windows=SMALL))) for n, text in enumerate(texts)]
    torch.manual_seed(9)
    called = english.generate("Hello.")
    results, errors = {}, []

    def hear(number):
        try:
            results[number] = joined(list(english.turbo.stream(texts[number], seed=number, windows=SMALL)))
        except BaseException as error:
            errors.append(error)

    def call():
        with english.turbo.lock:
            torch.manual_seed(9)
            results["call"] = english.generate("Hello.")

    threads = [threading.Thread(target=hear, args=(n,)) for n in range(3)] + [threading.Thread(target=call)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and torch.equal(results["call"], called)
    for number, wav in enumerate(expected):
        assert results[number].shape == wav.shape
        assert (results[number] - wav).abs().max() < 1e-3 * wav.abs().max()


def test_texts_follow_each_other(english):
    turbo.apply(english, QUIET)
    each = [joined(list(english.turbo.stream(text, seed=n, windows=SMALL))) for n, text in ((3, "One."), (4, "Two."))]
    both = joined(list(english.turbo.stream(iter(["One.", "Two."]), seed=3, windows=SMALL)))
    assert both.size(1) == sum(wav.size(1) for wav in each)


def test_a_text_that_is_too_long_is_said_in_pieces(english):
    turbo.apply(english, {**QUIET, "text": {"target": 30.0, "longest": 36.0}})
    text = "The quick brown fox jumps over the lazy dog. " * 16
    pieces = split(text, "en", target=30.0, longest=36.0)
    assert len(pieces) == 2 and pieces[0].pause > 0
    alone = [joined(list(english.turbo.stream(piece.text, seed=n))).size(1) for n, piece in enumerate(pieces)]
    whole = joined(list(english.turbo.stream(text, seed=0)))
    assert whole.size(1) == sum(alone) + int(pieces[0].pause * english.sr)


def test_a_voice_that_is_deleted_meanwhile_speaks_to_the_end(english, voice):
    turbo.apply(english, QUIET)
    english.turbo.voices.add("anna", voice)
    texts = ["One.", "Two.", "Three.", "Four."]
    whole = joined(list(english.turbo.stream(texts, seed=3, windows=SMALL, voice="anna")))
    with english.turbo.stream(texts, seed=3, windows=SMALL, voice="anna") as stream:
        blocks = [next(stream)]
        english.turbo.voices.remove("anna")
        blocks += list(stream)
    assert torch.equal(joined(blocks), whole)
    with pytest.raises(InvalidRequestError, match="no voice 'anna'"):
        english.turbo.stream("One.", voice="anna")


def test_streams_that_are_left_leave_nothing(english):
    turbo.apply(english, QUIET)
    engine = english.turbo.token_model
    for stop in range(6):
        with english.turbo.stream(TEXT, seed=stop, windows=SMALL) as stream:
            for number, _ in enumerate(stream):
                if number == stop % 3:
                    break
        assert next(stream, None) is None
        assert engine.service._run is None and engine.backbone.cache.nbytes == 0
    forgotten = english.turbo.stream([TEXT, TEXT, TEXT], seed=0, windows=SMALL)  # two are decoded beside each other
    next(forgotten)
    assert len(engine.service) >= 1
    del forgotten
    gc.collect()
    assert len(engine.service) == 0
    before = threading.active_count()
    assert english.generate("Hello.").numel() and engine.service._run is None
    assert threading.active_count() == before


def test_an_event_loop_goes_on_meanwhile(english):
    turbo.apply(english, QUIET)

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        blocks = []
        async for block in english.turbo.stream(TEXT, seed=2, windows=SMALL):
            blocks.append(block)
        ticking.cancel()
        return blocks, ticks

    blocks, ticks = asyncio.run(main())
    assert ticks > len(blocks) > 1
    assert torch.equal(joined(blocks), joined(list(english.turbo.stream(TEXT, seed=2, windows=SMALL))))


@pytest.mark.parametrize("heard", [0, 1])
def test_a_task_that_is_cancelled_while_a_block_is_made_falls_silent(english, heard):
    turbo.apply(english, QUIET)
    service = english.turbo.token_model.service

    async def main():
        begun, blocks = asyncio.Event(), []
        stream = english.turbo.stream([TEXT, TEXT], seed=2, windows=SMALL)

        async def speak():
            try:
                async for block in stream:
                    blocks.append(block)
                    begun.set()
            finally:
                await stream.aclose()

        task = asyncio.create_task(speak())
        if heard:
            await begun.wait()
        while stream._turn.acquire(blocking=False):  # until the next one is being made
            stream._turn.release()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return blocks, next(stream, None)

    blocks, after = asyncio.run(main())
    assert len(blocks) <= heard + 1 and after is None
    assert len(service) == 0 and service._run is None
    assert english.generate("Hello.").numel()


def test_what_cannot_stream_is_told(english):
    turbo.apply(english, {"decoding": {"enabled": False}})
    with pytest.raises(UnavailablePassError, match=r"Streams need the decoding pass"):
        english.turbo.stream("One.")
    turbo.apply(english, {"vocoder": {"enabled": False}})
    with pytest.raises(UnavailablePassError, match=r"Streams need the vocoder pass"):
        english.turbo.stream("One.")
    turbo.apply(english, QUIET)
    with pytest.raises(InvalidRequestError, match="temperature is -1"):
        list(english.turbo.stream("One.", temperature=-1.0))
    with pytest.raises(TypeError, match="colour"):
        list(english.turbo.stream("One.", colour="red"))
    stream = english.turbo.stream(TEXT, seed=2, windows=SMALL)
    next(stream)
    turbo.revert(english)
    with pytest.raises(UnavailablePassError, match="has been reverted"):
        next(stream)
    assert next(stream, None) is None
