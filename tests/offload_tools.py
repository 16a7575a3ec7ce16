"""What the tests of offload on a CPU share: a model of a file's own, and looking at the pages of its parts.

Fixtures are taken by name: ``own, model = offload_tools.own, offload_tools.model``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import chatterbox_turbo as turbo
from chatterbox_turbo.passes import offload as pass_file

QUIET = {"decoding": {"progress": "off", "kernel": "torch"}}


@pytest.fixture(scope="module")
def own(fresh):
    return fresh("english")


@pytest.fixture
def model(own):
    voice = own.conds
    yield own
    turbo.revert(own)
    own.conds = voice


def residence_of(model):
    """What moves the parts of an optimized model."""
    setting = next(s for s in model.turbo._settings if isinstance(getattr(s, "__self__", None), pass_file.Residence))
    return setting.__self__


def pages(model, name):
    return residence_of(model).places[name].pages


def apply(model, mode, **options):
    return turbo.apply(model, {**QUIET, "offload": {"mode": mode, **options}})


def lines(text):
    return [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if text in line]
