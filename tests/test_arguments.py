"""Numbers of a request, however written: what is meant is taken, the rest refused before anything is done."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import request_for, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.runtime import arguments
from chatterbox_turbo.runtime.t3.sampling import SamplingParameters
from chatterbox_turbo.upstream.families import identify

NAN, INFINITY = float("nan"), float("inf")
NO_NUMBERS = (
    None,
    "0.5",
    True,
    np.True_,
    [0.5],
    np.array([0.5, 0.5]),
    torch.tensor([0.5]),
    0.5j,
    {},
    NAN,
    INFINITY,
    -INFINITY,
    10**400,
    -(10**5000),
)
OUT_OF_RANGE = {
    "temperature": (-0.1, np.float32(-1)),
    "repetition_penalty": (0, -1.0),
    "min_p": (-0.01, 1.01),
    "top_p": (-0.01, 1.01),
    "cfg_weight": (-0.5,),
    "exaggeration": (),
    "top_k": (0.5,),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_what_does_not_fit_is_refused_with_a_sentence(name):
    for value in (*NO_NUMBERS, *OUT_OF_RANGE[name], np.float64(NAN), torch.tensor(NAN)):
        with pytest.raises(InvalidRequestError, match=rf"^{name} is .*, but must be ") as caught:
            arguments.plain(name, value)
        assert len(str(caught.value)) < 160


@pytest.mark.parametrize("convert", [np.float64, np.float32, np.float16, torch.tensor, np.array, Fraction])
def test_numbers_of_any_make_are_taken(convert):
    for name in arguments.RANGES:
        found = arguments.plain(name, convert(0.5))
        assert type(found) is float and found == 0.5
    for given in (1000, 1000.0, convert(1000.0), np.int64(1000), torch.tensor(1000)):
        found = arguments.plain("top_k", given)
        assert type(found) is int and found == 1000
    assert arguments.plain("text", given) is given


def test_parameters_hold_pythons_own():
    given = SamplingParameters(np.float32(0.5), torch.tensor(2.0), np.float64(0.25), 1, 1000.0, np.int32(1))
    assert given == SamplingParameters(0.5, 2.0, 0.25, 1.0, 1000, 1.0)
    assert [type(value) for value in vars(given).values()] == [float, float, float, float, int, float]


@pytest.mark.parametrize("preset", ["exact", "auto"])
@pytest.mark.parametrize("model", ["english", "multilingual", "turbo"], indirect=True)
def test_calls_are_refused_before_anything_is_done(model, preset):
    turbo.apply(model, {"preset": preset, "decoding": {"progress": "off"}})
    voice, ran = identify(model).voice, []
    before = {name: value.clone() for name, value in vars(voice.t3).items() if torch.is_tensor(value)}
    hook = model.t3.register_forward_pre_hook(lambda *_: ran.append(1))
    state = torch.get_rng_state()
    names = ["temperature", "repetition_penalty", "min_p", "top_p", "cfg_weight", "exaggeration"]
    try:
        for name in [*names, "top_k"] if identify(model).family == "turbo" else names:
            for value in (NAN, None, "0.5", -INFINITY):
                with pytest.raises(InvalidRequestError, match=f"^{name} is "):
                    speak(model, **{name: value})
    finally:
        hook.remove()
    torch.set_rng_state(state)
    assert identify(model).voice is voice and not ran
    after = {name: value for name, value in vars(voice.t3).items() if torch.is_tensor(value)}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("preset", ["exact", "auto"])
@pytest.mark.parametrize("model", ["english", "turbo"], indirect=True)
def test_what_is_meant_speaks_as_what_is_written(model, preset):
    turbo.apply(model, {"preset": preset, "decoding": {"progress": "off"}})
    plain = {"temperature": 0.5, "repetition_penalty": 1.25, "top_p": 0.75, "cfg_weight": 0.5, "exaggeration": 0.75}
    plain |= {"top_k": 500} if identify(model).family == "turbo" else {"min_p": 0.125}
    expected = speak(model, **plain)
    others = {
        name: np.float64(value) if number % 2 else torch.tensor(float(value))
        for number, (name, value) in enumerate(plain.items())
    }
    assert torch.equal(speak(model, **others), expected)
    assert torch.equal(speak(model, **{name: np.float32(value) for name, value in plain.items()}), expected)


def test_arguments_may_be_positional(english):
    turbo.apply(english, {"preset": "exact", "decoding": {"progress": "off"}})
    (text,) = request_for(english).values()
    with pytest.raises(InvalidRequestError, match=r"^repetition_penalty is nan"):
        english.generate(text, NAN)
    with pytest.raises(InvalidRequestError, match=r"^top_p is 3"):
        english.generate(text, 1.2, 0.05, 3)


@pytest.mark.parametrize("value", [NAN, None, "loud"])
def test_a_voice_is_not_prepared_with_it(english, voice, value):
    turbo.apply(english, "exact")
    own = english.conds
    with pytest.raises(InvalidRequestError, match=r"^exaggeration is "):
        english.prepare_conditionals(voice, exaggeration=value)
    assert english.conds is own


def test_seeds_of_a_batch_are_numbers(english):
    turbo.apply(english, {"preset": "exact", "decoding": {"progress": "off"}})
    with pytest.raises(InvalidRequestError, match=r"^seed is 'one'"):
        english.turbo.batch([{"text": "Hello.", "seed": "one"}])
