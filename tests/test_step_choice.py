"""Which implementation of the decode step is taken: measured once, remembered, and its kernels ready beforehand."""

from __future__ import annotations

import json

import numba
import pytest
import torch

from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.cpu import step_kernels
from chatterbox_turbo.runtime.cpu.measurements import CACHE_VARIABLE
from chatterbox_turbo.runtime.t3 import step_choice
from chatterbox_turbo.runtime.t3.backbone import StaticBackbone
from chatterbox_turbo.runtime.t3.step_choice import Choice, choose_step, fastest
from chatterbox_turbo.upstream import t3_weights


@pytest.fixture
def journal():
    journal = Journal()
    yield journal
    journal.undo()


def test_the_fastest_step_is_measured_once_and_remembered(english, journal, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "deep" / "folder"))
    t3_weights.fuse(english.t3, journal)
    weights = t3_weights.read(english.t3)
    choice = fastest(weights)
    written = tmp_path / "deep" / "folder" / "steps.json"
    assert set(choice.names.values()) <= {"torch", "numba"} and "ms a layer" in choice.remark
    known = json.loads(written.read_text())
    for times in known[step_choice._machine(weights)].values():
        times["numba"] = times["torch"] + 1.0
    written.write_text(json.dumps(known))
    assert set(fastest(weights).names.values()) == {"torch"}, "measured again, or not read"
    written.write_text("{ broken")
    assert set(fastest(weights).names) == set(choice.names)


def test_a_number_of_rows_between_two_measured_ones_takes_the_larger():
    choice = Choice({1: "a", 2: "b", 8: "c"}, "")
    assert [choice.name(rows) for rows in (1, 2, 3, 8, 30)] == ["a", "b", "c", "c", "c"]


@pytest.mark.parametrize("quicker", ["numba", "torch"])
def test_kernels_are_ready_for_the_cache_that_they_are_given(english, journal, tmp_path, monkeypatch, quicker):
    """Where torch is faster for many rows, the cache beside bf16 weights is fp32: kernels are compiled for that too."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    t3_weights.cast(english.t3, torch.bfloat16, journal)
    t3_weights.fuse(english.t3, journal)
    weights = t3_weights.read(english.t3)
    times = {str(rows): {"numba": 1.0, "torch": 0.5 if rows == 16 and quicker == "torch" else 2.0}
             for rows in step_choice.ROWS}  # fmt: skip
    (tmp_path / "steps.json").write_text(json.dumps({step_choice._machine(weights): times}))
    kinds = []

    def watched(*arguments):
        kinds.append(tuple(map(numba.typeof, arguments)))
        return block(*arguments)

    block = step_kernels.block
    monkeypatch.setattr(step_kernels, "block", watched)
    step, remark = choose_step(weights, (), "auto", graphs=False)
    assert ("torch from 9 rows on" in remark) == (quicker == "torch")
    assert step.cache_dtype == (torch.float32 if quicker == "torch" else torch.bfloat16)
    ready = set(kinds)
    kinds.clear()
    backbone = StaticBackbone(weights, step)
    with torch.inference_mode():
        backbone.begin(1, 2)
        backbone.admit([torch.zeros(2, 9, weights.width)], [1])
        backbone.step(torch.zeros(2, weights.width))
    assert kinds and set(kinds) <= ready
