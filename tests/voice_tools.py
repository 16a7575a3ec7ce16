"""What the tests of named voices share: a model with two of them, and looking at what is stored.

Fixtures are taken by name: ``higher, two = voice_tools.higher, voice_tools.two``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from recordings import EXACT, RATE, wav

import chatterbox_turbo as turbo
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.voices import named_tensors

WITHOUT = {name: {"enabled": False} for name in EXACT if name != "fidelity"}  # every pass
_encoded: dict[str, dict[str, Any]] = {}  # the voices low and high by family


@pytest.fixture
def higher(samples):
    """Another speaker (n,) float32 at 24 kHz, 6 s: the bundled one a fifth higher."""
    short = samples[: 9 * RATE]
    return np.interp(np.arange(0, len(short) - 1, 1.5), np.arange(len(short)), short).astype(np.float32)


@pytest.fixture
def two(kept, samples, higher):
    """``two(family)``: a model with the voices low and high; by default the conditioning pass alone."""

    def get(family, config=EXACT):
        model = turbo.apply(kept(family), config)
        voices = model.turbo.voices
        if family not in _encoded:
            voices.add("low", wav(samples[: 6 * RATE]))
            voices.add("high", wav(higher))
            _encoded[family] = {name: voices.conditionals(name) for name in voices}
            voices.clear()
            for name in _encoded[family]:
                voices.remove(name)
        for name, given in _encoded[family].items():
            voices.add(name, given)
        return model

    return get


def own_of(model):
    return identify(model).voice


def stored(voices, name):
    return named_tensors(voices._find(name).voice)
