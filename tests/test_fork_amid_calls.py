"""A child that is forked while another thread is in the midst of a call has nothing of that call's state."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_fork import run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
PLACES = [  # kind of call, the function of the package at whose beginning the other thread is
    ("generate", "Batch.step"),  # tokens are being decoded, with another voice than the model's own
    ("generate", "FlowSolver.solve"),
    ("generate", "Residence._settle"),  # parts of the model are on their way
    ("batch", "Pipeline.utterance"),
    ("batch", "copy_voice"),
    ("batch", "KVCache._grow"),
    ("batch", "seed"),  # the process's random numbers are an utterance's
    ("stream", "Batch.step"),  # the generator of tokens is running
]


@pytest.fixture(scope="module")
def outcomes():
    found = json.loads(run(str(Path(__file__).with_name("forked_amid_calls.py")), json.dumps(PLACES)))
    return dict(zip(PLACES, found, strict=True))


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_a_child_has_the_models_own_voice_and_counters_and_reverts(outcomes, kind, place):
    reached, speaks, reverts = outcomes[kind, place]
    assert reached
    assert speaks == dict.fromkeys(speaks, True)
    assert reverts == {"reverted": True}
