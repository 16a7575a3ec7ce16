"""Several utterances at once: each as alone, the model and the random numbers left as they were."""

from __future__ import annotations

import pytest
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import InvalidRequestError, UnavailablePassError
from chatterbox_turbo.measure.fidelity import snr_db

QUIET = {"decoding": {"progress": "off"}}
TEXTS = ("One.", "The quick brown fox jumps over the lazy dog.", "Is it two, or three?")


def items_for(model, voice):
    options = [{"seed": 3}, {"seed": 4, "temperature": 0.5, "audio_prompt_path": voice}, {"seed": 5, "top_p": 0.9}]
    if "Turbo" not in type(model).__name__:
        options[0]["exaggeration"], options[2]["cfg_weight"] = 0.9, 0.0
    if "Multilingual" in type(model).__name__:
        for one, language in zip(options, ("en", "fr", "de"), strict=True):
            one["language_id"] = language
    if "Turbo" in type(model).__name__:
        del options[1]["audio_prompt_path"]  # upstream's own preparation fails on NumPy 2
    return [{"text": text, **one} for text, one in zip(TEXTS, options, strict=True)]


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("model", ["english", "multilingual", "turbo"], indirect=True)
def test_each_utterance_is_what_it_is_alone(model, voice, slots):
    turbo.apply(model, {"decoding": {"progress": "off", "kernel": "numba"}})
    items = items_for(model, voice)
    conds = model.conds
    torch.manual_seed(11)
    state = torch.get_rng_state()
    together = model.turbo.batch(items, slots)
    assert torch.equal(torch.get_rng_state(), state) and model.conds is conds
    for item, wav in zip(items, together, strict=True):
        arguments = {key: value for key, value in item.items() if key != "seed"}
        model.conds = conds
        torch.manual_seed(item["seed"])
        alone = model.generate(**arguments)
        model.conds = conds
        assert alone.shape == wav.shape and snr_db(wav, alone) > 60
        assert model.watermarker.get_watermark(wav[0].numpy(), sample_rate=model.sr).mean() > 0.9


def test_voices_differ_and_seeds_come_from_the_global_generator(english, voice):
    turbo.apply(english, QUIET)
    own = english.conds
    english.prepare_conditionals(voice)
    other, english.conds = english.conds, own
    items = [{"text": "One two."}, {"text": "One two.", "voice": other}]
    torch.manual_seed(1)
    first = english.turbo.batch(items)
    again_later = english.turbo.batch(items)
    torch.manual_seed(1)
    again = english.turbo.batch(items)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], again_later[0]) and not torch.equal(first[0], first[1])
    assert english.conds is own


def test_nothing_gives_nothing_and_bad_items_are_named(english):
    turbo.apply(english, QUIET)
    assert english.turbo.batch([]) == []
    for bad, said in (
        ([{"text": "One."}, "Two."], "Item 1 of the batch is 'Two.'"),
        ([{"temperature": 0.5}], "must be a dict with a text"),
        ([{"text": "One.", "voice": 3}], "voice is 3, but must be a name, or conditionals"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            english.turbo.batch(bad)
    with pytest.raises(InvalidRequestError, match="slots is 0"):
        english.turbo.batch([{"text": "One."}], slots=0)
    with pytest.raises(InvalidRequestError, match="temperature is -1"):
        english.turbo.batch([{"text": "One."}, {"text": "Two.", "temperature": -1.0}])
    assert torch.isfinite(english.turbo.batch([{"text": ""}])[0]).all()  # upstream has a sentence for it


def test_an_exception_in_the_middle_leaves_the_model_usable(english):
    class Stop(Exception):
        pass

    def stop(count, limit):
        if count == 5:
            raise Stop

    items = [{"text": text, "seed": number} for number, text in enumerate(TEXTS)]
    turbo.apply(english, QUIET)
    expected, conds = english.turbo.batch(items), english.conds
    with turbo.optimized(english, {"decoding": {"progress": stop}}), pytest.raises(Stop):
        english.turbo.batch(items)
    assert english.conds is conds
    assert all(torch.equal(a, b) for a, b in zip(english.turbo.batch(items), expected, strict=True))


def test_without_the_decoding_pass_there_is_no_batch(english, models):
    turbo.apply(english, {"decoding": {"enabled": False}})
    with pytest.raises(UnavailablePassError, match=r"need the decoding pass.*disabled"):
        english.turbo.batch([{"text": "One."}])
    vc = models("vc")
    with turbo.optimized(vc), pytest.raises(UnavailablePassError, match="does not apply"):
        vc.turbo.batch([{"text": "One."}])


def test_a_handle_that_has_outlived_its_patches_is_told(english):
    handle = turbo.apply(english, QUIET).turbo
    turbo.revert(english)
    with pytest.raises(UnavailablePassError, match="has been reverted"):
        handle.batch([{"text": "One."}])


@pytest.mark.parametrize("model", ["english", "multilingual"], indirect=True)
def test_the_exact_preset_decodes_one_after_the_other(model):
    turbo.apply(model, {"preset": "exact", **QUIET})
    language = {"language_id": "en"} if "Multilingual" in type(model).__name__ else {}
    items = [{"text": text, "seed": 7, **language} for text in TEXTS[:2]]
    together = model.turbo.batch(items)
    for item, wav in zip(items, together, strict=True):
        torch.manual_seed(7)
        assert torch.equal(model.generate(item["text"], **language), wav)


def test_a_model_without_a_voice_takes_one_from_the_item(voice):
    model = synthetic.build("english", "tiny", seed=3)
    model.conds = None
    turbo.apply(model, QUIET)
    with pytest.raises(InvalidRequestError, match="no voice"):
        model.turbo.batch([{"text": "One."}])
    assert torch.isfinite(model.turbo.batch([{"text": "One.", "audio_prompt_path": voice}])[0]).all()
    assert model.conds is None
