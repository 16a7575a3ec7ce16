"""Named voices in calls: each call with its own, the model's and the stored ones untouched; many threads."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
import tracemalloc

import numpy as np
import pytest
import torch
import voice_tools
from cases import FAMILIES, SPEAKING, count_hooks, request_for, speak
from recordings import EXACT, RATE, differences, voice_of, wav
from voice_tools import WITHOUT, own_of, stored

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.upstream.families import identify

higher, two = voice_tools.higher, voice_tools.two
QUIET = {"decoding": {"progress": "off"}}


def recording(model):
    return "target_voice_path" if identify(model).family == "vc" else "audio_prompt_path"


@pytest.mark.parametrize("config", [EXACT, WITHOUT], ids=["encoded here", "by upstream"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_named_voice_is_its_recording_for_one_call(kept, voice, family, config):
    model = kept(family)
    if family == "turbo" and config is WITHOUT and int(np.__version__.split(".")[0]) >= 2:
        pytest.skip("upstream's Turbo takes no recording where NumPy is 2")
    turbo.apply(model, config)
    own, before = own_of(model), voice_of(model)
    model.turbo.voices.add("anna", voice)
    assert own_of(model) is own and not differences(voice_of(model), before)
    expected = stored(model.turbo.voices, "anna")
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    spoken = speak(model, 1, voice="anna")
    assert own_of(model) is own and not differences(voice_of(model), before)
    assert not torch.equal(speak(model, 1), spoken)
    now = stored(model.turbo.voices, "anna")
    assert all(torch.equal(now[name], tensor) for name, tensor in expected.items()), "generate wrote into it"
    assert torch.equal(speak(model, 1, **{recording(model): voice}), spoken)
    model.turbo.voices.use("anna")
    with torch.no_grad():
        (own_of(model) if family == "vc" else own_of(model).gen)["embedding"].zero_()
    assert torch.equal(speak(model, 1, voice="anna"), spoken)
    model.turbo.voices.use("anna")
    assert torch.equal(speak(model, 1), spoken)


@pytest.mark.parametrize("family", ["english", "multilingual"])
def test_exaggeration_is_of_the_call(two, samples, family):
    model = two(family)
    for exaggeration in (0.2, 0.9):
        spoken, given = speak(model, 1, voice="low", exaggeration=exaggeration), wav(samples[: 6 * RATE])
        assert torch.equal(speak(model, 1, audio_prompt_path=given, exaggeration=exaggeration), spoken)
    with pytest.raises(InvalidRequestError, match=r"exaggeration is no part of a voice.*Pass it to generate"):
        model.turbo.voices.add("x", wav(samples), exaggeration=0.3)


def test_options_are_those_of_the_method_that_encodes(two, samples):
    voices = two("turbo").turbo.voices
    voices.add("as it is", wav(samples[: 6 * RATE]), norm_loudness=False)
    assert not torch.equal(*(stored(voices, name)["gen.prompt_feat"] for name in ("low", "as it is")))
    with pytest.raises(InvalidRequestError, match=r"norm_loudnes.*did you mean 'norm_loudness'"):
        voices.add("x", wav(samples), norm_loudnes=False)


def test_blocks_are_of_a_thread_and_of_a_task(two):
    model = two("english")
    voices = model.turbo.voices
    low, high, own = (speak(model, 1, voice=name) for name in ("low", "high", None))

    def elsewhere(function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]

    with voices.using("low"):
        assert torch.equal(speak(model, 1), low)
        assert torch.equal(elsewhere(lambda: speak(model, 1)), own)
        assert torch.equal(speak(model, 1, voice="high"), high)
        with voices.using("high"):
            voices.remove("high")
            assert torch.equal(speak(model, 1), high)
        with voices.outside():
            assert torch.equal(speak(model, 1), own)
        assert torch.equal(speak(model, 1), low)
    assert torch.equal(speak(model, 1), own)
    with pytest.raises(ZeroDivisionError), voices.using("low"):
        raise ZeroDivisionError
    assert torch.equal(speak(model, 1), own)

    def seeded():
        with model.turbo.lock:  # the generator is everybody's
            return speak(model, 1)

    async def task(name):
        with voices.using(name) if name else voices.outside():
            await asyncio.sleep(0)  # the other tasks are in their blocks now
            return await asyncio.to_thread(seeded)

    async def both():
        return await asyncio.gather(task("low"), task(None))

    first, second = asyncio.run(both())
    assert torch.equal(first, low) and torch.equal(second, own)


def test_a_block_that_is_left_in_another_context_ends(two):
    voices = two("english").turbo.voices

    async def dependency():
        with voices.using("low"):
            yield

    async def run():
        made = dependency()
        await asyncio.create_task(made.__anext__())
        await asyncio.create_task(made.aclose())

    asyncio.run(run())
    assert voices.choose() is None


def test_a_recording_in_a_call_goes_before_the_block(two, samples):
    model = two("english")
    low = speak(model, 1, voice="low")
    with model.turbo.voices.using("high"):
        assert torch.equal(speak(model, 1, audio_prompt_path=wav(samples[: 6 * RATE])), low)
    assert torch.equal(speak(model, 1), low), "as without the block, it is the model's from then on"


def test_conditionals_are_a_voice_for_a_call(two):
    model = two("english")
    voices = model.turbo.voices
    given = voices.conditionals("high")
    before = {name: tensor.clone() for name, tensor in given.gen.items() if tensor is not None}
    assert torch.equal(speak(model, 1, voice=given), speak(model, 1, voice="high"))
    assert all(torch.equal(given.gen[n], t) and given.gen[n].dtype == t.dtype for n, t in before.items())
    for wrong in (given.gen, 3, b"low"):
        with pytest.raises(InvalidRequestError, match="must be a name, or conditionals"):
            speak(model, voice=wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_voices_and_contradictions(two, voice, family):
    model = two(family)
    own, voices = own_of(model), model.turbo.voices
    for wrong in (
        lambda: speak(model, voice="hihg"),
        lambda: voices.use("hihg"),
        lambda: voices.using("hihg").__enter__(),
        lambda: voices.remove("hihg"),
        lambda: voices.show("hihg"),
        lambda: voices.blend({"low": 1, "hihg": 1}, as_="x"),
    ):
        with pytest.raises(
            InvalidRequestError, match=r"no voice 'hihg' \(did you mean 'high'\?\). There are: low, high"
        ):
            wrong()
    with pytest.raises(InvalidRequestError, match="no voice ''"):
        speak(model, voice="")
    with pytest.raises(InvalidRequestError, match=r"Both voice \('low'\) and a recording .* Pass one"):
        speak(model, voice="low", **{recording(model): voice})
    assert own_of(model) is own and voices.list() == ["low", "high"]


@pytest.mark.parametrize("family", SPEAKING)
def test_batches_take_names_and_blocks(two, family):
    model = two(family, QUIET)
    own = own_of(model)
    items = [{**request_for(model), "seed": 1, "voice": name} for name in ("low", "high")]
    rest = {**request_for(model), "seed": 1}
    together = model.turbo.batch([*items, rest])
    with model.turbo.voices.using("low"):
        inside = model.turbo.batch([items[1], rest])
    for wav_, expected in zip((together[0], together[1], together[2]), ("low", "high", None), strict=True):
        alone = speak(model, 1, voice=expected)
        assert wav_.shape == alone.shape and torch.allclose(wav_, alone, atol=1e-3)
    assert torch.allclose(inside[0], together[1], atol=1e-3) and torch.allclose(inside[1], together[0], atol=1e-3)
    assert own_of(model) is own and items[0]["voice"] == "low"
    with pytest.raises(InvalidRequestError, match="no voice 'lwo'"):
        model.turbo.batch([{**rest, "voice": "lwo"}])
    with pytest.raises(InvalidRequestError, match="Both voice"):
        model.turbo.batch([{**items[0], "audio_prompt_path": "x.wav"}])


@pytest.mark.exhaustive
def test_a_thousand_switches_leave_nothing_behind(two):
    model = two("english")
    voices = model.turbo.voices

    def tensors():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())  # proxies may be dead

    def switch(count):
        for number in range(count):
            name = ("low", "high")[number % 2]
            voices.use(name)
            with voices.using(name):
                voices.choose()

    switch(10)
    speak(model, voice="low")
    before = (tensors(), count_hooks(model.s3gen), count_hooks(model.t3), threading.active_count(), voices.nbytes)
    tracemalloc.start()
    switch(20)
    first = tracemalloc.get_traced_memory()[0]
    switch(1000)
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    for number in range(4):
        speak(model, voice=("low", "high")[number % 2])
    after = (tensors(), count_hooks(model.s3gen), count_hooks(model.t3), threading.active_count(), voices.nbytes)
    assert after[0] <= before[0] and after[1:] == before[1:] and grown < voices.show("low")["bytes"], grown


@pytest.mark.exhaustive
def test_sixteen_threads_speak_and_switch_at_once(two, samples, higher):
    model = two("turbo", QUIET)
    voices, both = model.turbo.voices, ("low", "high")
    given = {"low": wav(samples[: 6 * RATE]).getvalue(), "high": wav(higher).getvalue()}
    expected = {name: speak(model, 1, voice=name) for name in both}
    assert not torch.equal(*expected.values())
    wrong, errors, start = [], [], threading.Barrier(16)

    def by_argument(name):
        with model.turbo.lock:
            return speak(model, 1, voice=name)

    def by_block(name):
        with voices.using(name), model.turbo.lock:
            return speak(model, 1)

    def by_use(name):
        with model.turbo.lock:
            voices.use(name)
            return speak(model, 1)

    def by_recording(name):
        with model.turbo.lock:
            return speak(model, 1, audio_prompt_path=io.BytesIO(given[name]))

    def work(number):
        way, name, mine = (by_argument, by_block, by_use, by_recording)[number % 4], both[number // 4 % 2], f"t{number}"
        try:
            start.wait(timeout=60)
            for _ in range(2):
                voices.add(mine, voices.conditionals(name))
                voices.use(both[number % 2])
                if not torch.equal(way(name), expected[name]) or not torch.equal(by_argument(mine), expected[name]):
                    wrong.append(number)
                voices.blend({"low": 1, "high": 2}, as_=f"{mine} mix")
                voices.remove(f"{mine} mix")
                voices.remove(mine)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not wrong and voices.list() == ["low", "high"]


def test_switching_does_not_wait_for_names_while_a_call_runs(two):
    """A thread that holds the model does not keep others from looking at names, nor the other way round."""
    model = two("english")
    voices, done = model.turbo.voices, []
    with model.turbo.lock:
        thread = threading.Thread(target=lambda: done.append((voices.list(), voices.show("low"), voices.nbytes)))
        thread.start()
        thread.join(timeout=20)
    assert len(done) == 1
