"""Parts that leave a simulated CUDA device: a weight that is used while it is away raises there, as on a real one."""

from __future__ import annotations

import pytest
import torch
from cases import request_for

import chatterbox_turbo as turbo
from chatterbox_turbo.passes import offload
from chatterbox_turbo.runtime.device import overlay
from chatterbox_turbo.runtime.s3gen.streaming import Windows
from chatterbox_turbo.speech.stream import joined

QUIET = {"decoding": {"progress": "off"}}


@pytest.fixture(autouse=True)
def _small_parts_leave_too(monkeypatch):
    monkeypatch.setattr(overlay, "SMALLEST", 256)


def seeded(simulated, run):
    simulated.machine.generators[0].manual_seed(5)
    torch.manual_seed(0)
    return run()


def kinds(module):
    return {p.device.type for p in module.parameters() if p.nbytes > 256}


def generations(model):
    engines = model.turbo._engines
    return [engines.flow.prepared.generation, engines.vocoder.prepared.generation]


@pytest.mark.exhaustive
@pytest.mark.parametrize("family, mode", [("vc", "sequential"), ("english", "idle"), ("turbo", "sequential")])
def test_samples_are_the_same_and_nothing_is_made_anew(simulated, family, mode):
    model = simulated.get(family)

    def speak():
        return seeded(simulated, lambda: model.generate(**request_for(model)))

    turbo.apply(model, QUIET)
    plain = speak()
    turbo.apply(model, {**QUIET, "offload": {"mode": mode}})
    assert torch.equal(speak(), plain)
    before = generations(model)
    assert torch.equal(speak(), plain)
    assert generations(model) == before and model.turbo.renewals == ()
    assert kinds(model.s3gen.speaker_encoder) == {"cpu"}
    for part in (model.s3gen.flow, model.s3gen.mel2wav, *([model.t3] if family != "vc" else [])):
        assert kinds(part) == {"cpu" if mode == "sequential" else "cuda"}
    # the first parameter of S3Gen, in its tokenizer, tells where the model is
    assert kinds(model.s3gen.tokenizer) == ({"cuda"} if family == "vc" else {"cpu", "cuda"})
    turbo.revert(model)
    assert kinds(model.s3gen) == {"cuda"}


def test_a_part_comes_early_where_nothing_lies_in_its_place(simulated):
    """Flow and vocoder lie over T3's place: what came while T3 computes would be read as T3's weights."""
    model, expected = simulated.get("turbo"), []
    turbo.apply(model, {**QUIET, "offload": {"mode": "sequential"}})
    own = overlay.DevicePart.expect

    def expect(part):
        own(part)
        expected.append(part._coming is not None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlay.DevicePart, "expect", expect)
        model.generate(**request_for(model))
    assert expected == [False, True]  # the flow during T3, the vocoder during the flow


def test_adaptive_goes_to_sequential_and_back(simulated, monkeypatch):
    model, free = simulated.get("turbo"), [0.5]
    monkeypatch.setattr(offload, "free_memory", lambda device: (int(free[0] * 2**30), 2**30))

    def speak():
        return seeded(simulated, lambda: model.generate(**request_for(model)))

    turbo.apply(model, QUIET)
    plain = speak()
    turbo.apply(model, {**QUIET, "offload": {"mode": "adaptive"}})
    for share, home in ((0.5, "cuda"), (0.05, "cpu"), (0.9, "cuda")):
        free[0] = share
        assert torch.equal(speak(), plain)
        assert kinds(model.t3) == {home}


def test_a_quantized_t3_leaves_and_batches_speak(simulated):
    model = simulated.get("turbo")
    config = {"fidelity": "lossy", **QUIET, "quantization": {"t3": "int4", "backend": "torch"}}

    def speak():
        requests = [{"text": text, "seed": seed} for seed, text in enumerate(("One.", "Two, three."))]
        return seeded(simulated, lambda: model.turbo.batch(requests))

    turbo.apply(model, config)
    plain = speak()
    turbo.apply(model, {**config, "offload": {"mode": "sequential"}})
    for ours, theirs in zip(speak(), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert kinds(model.t3) <= {"cpu"} and {b.device.type for b in model.t3.buffers() if b.nbytes > 256} <= {"cpu"}


def test_streams_speak_though_flow_and_vocoder_take_t3s_place(simulated):
    model, windows = simulated.get("turbo"), Windows(first_chunk=3, chunk=4, growth=1.0, longest_chunk=4)
    text = request_for(model)["text"]

    def speak():
        return seeded(simulated, lambda: joined(list(model.turbo.stream([text, text], seed=1, windows=windows))))

    turbo.apply(model, QUIET)
    plain = speak()
    turbo.apply(model, {**QUIET, "offload": {"mode": "sequential"}})
    assert torch.equal(speak(), plain)
