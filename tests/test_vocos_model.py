"""Vocos in a model: what is heard and reported, HiFT's weights away and back, memory, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import vocos_tools
from cases import onlooker, speak
from snapshots import difference, snapshot
from vocos_tools import LIMIT, frames

import chatterbox_turbo as turbo
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.cpu import cold
from chatterbox_turbo.runtime.device import overlay
from chatterbox_turbo.runtime.s3gen import vocoder as hift
from chatterbox_turbo.runtime.s3gen.vocos_checkpoint import WEIGHTS, load

network, checkpoint, config = vocos_tools.network, vocos_tools.checkpoint, vocos_tools.config


def vocode(model, mel):
    return model.s3gen.mel2wav.inference(speech_feat=mel)


def counted(monkeypatch, model):
    """Counts what HiFT computes: this package's functions and upstream's modules."""
    calls = []
    for name in ("pitch_of", "excite", "samples_of"):
        real = getattr(hift, name)
        monkeypatch.setattr(hift, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    mel2wav = model.s3gen.mel2wav
    hooks = [
        module.register_forward_pre_hook(onlooker(lambda module, _: calls.append(type(module).__name__)))
        for module in (mel2wav.f0_predictor, mel2wav.m_source)
    ]
    return calls, hooks


def test_samples_are_the_networks_and_nothing_of_hift_is_run(english, network, config, monkeypatch):
    speak(english)  # upstream keeps embeddings in the voice
    before, mel = snapshot(english), frames(9)
    upstreams = [part.clone() for part in seeded(english, mel)]
    calls, hooks = counted(monkeypatch, english)
    seeded(english, mel)
    assert len(calls) == 2, calls
    turbo.apply(english, {"vocoder": {"enabled": True}})
    seeded(english, mel)
    assert set(calls[2:]) == {"pitch_of", "excite", "samples_of"}
    calls.clear()

    turbo.apply(english, config)
    state = torch.get_rng_state()
    samples, source = vocode(english, mel)
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    assert snr_db(samples, network(mel).clamp(-LIMIT, LIMIT)) > 100
    assert source.shape == (1, 1, samples.size(1)) and not source.any()
    wav = speak(english)
    assert english.watermarker.get_watermark(wav[0].numpy(), sample_rate=english.sr).mean() == 1.0
    batch = english.turbo.batch([{"text": "One.", "seed": 3}, {"text": "Two three four.", "seed": 4}])
    parts = [block for block, _ in english.turbo.stream("One.", seed=3)]
    assert sum(part.size(1) for part in parts) == batch[0].size(1)
    assert calls == []

    turbo.revert(english)
    for hook in hooks:
        hook.remove()
    assert difference(before, snapshot(english)) == []
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(seeded(english, mel), upstreams, strict=True))


def seeded(model, mel):
    torch.manual_seed(3)
    return vocode(model, mel)


def resident(tensors):
    return cold.resident((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors)


@pytest.mark.skipif(bool(cold.why_not()), reason="pages cannot be let go here")
def test_hifts_weights_are_not_in_memory_meanwhile(english, config, checkpoint):
    module = english.s3gen.mel2wav
    large = [p for p in module.parameters() if p.nbytes > 16 * cold.PAGE]
    total, values = sum(p.nbytes for p in large), [p.detach().clone() for p in module.parameters()]
    turbo.apply(english, config)
    speak(english)
    assert resident(large) < 0.1 * total
    held = english.turbo.memory()["held"]["vocoder"]["bytes"]
    own = sum(p.nbytes for p in load(checkpoint).parameters())
    assert own <= held < 2 * own + 2**20
    turbo.revert(english)
    assert resident(large) > 0.9 * total
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), values, strict=True))


def test_the_report_calls_it_lossy_and_shows_the_checkpoints_figures(english, config):
    turbo.apply(english, config)
    step = english.turbo.plan.step("vocoder")
    assert (step.status, step.fidelity) == ("on", "lossy")
    said = str(english.turbo.report())
    assert "Vocos (2 layers, 32 wide" in said and "log-mel distance 0.25" in said
    assert "have left for the file" in said or "weights stay: " in said
    assert turbo.inspect(english, config).step("vocoder").status == "on"


@pytest.mark.skipif(bool(cold.why_not()), reason="pages cannot be let go here")
def test_it_leaves_memory_between_its_phases(english, network, config):
    speak(english)
    before, mel = snapshot(english), frames(6)
    turbo.apply(english, {**config, "offload": {"mode": "sequential"}})
    own = english.turbo._engines.vocoder.tensors
    first = speak(english)
    assert "vocoder" in english.turbo.plan.step("offload").reason
    mapped = [line for line in cold.MAPS.read_text().splitlines() if "(deleted)" in line]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    assert all(any(low <= t.data_ptr() < high for low, high in spans) for t in own)
    assert torch.equal(speak(english), first)
    assert snr_db(vocode(english, mel)[0], network(mel).clamp(-LIMIT, LIMIT)) > 100
    turbo.revert(english)
    assert difference(before, snapshot(english)) == []


@pytest.mark.skipif(bool(cold.why_not()), reason="pages cannot be let go here")
def test_a_budget_counts_the_checkpoint_and_not_hift(english, config, checkpoint):
    budget = {"memory_budget": "20GB"}
    plain = turbo.inspect(english, {"fidelity": "lossy", "vocoder": {"enabled": True}, **budget}).fit.estimate
    made = turbo.inspect(english, {**config, **budget}).fit.estimate
    assert made.parts["vocos"] == (checkpoint / WEIGHTS).stat().st_size
    assert made.parts["s3gen.mel2wav"] == 0 < plain.parts["s3gen.mel2wav"]


@torch.inference_mode()
def spoken(model):
    """Samples of ten tokens, without T3."""
    torch.manual_seed(0)
    tokens = torch.arange(10, device="cuda")[None]
    return model.s3gen.inference(speech_tokens=tokens, ref_dict=dict(model.conds.gen))[0]


def test_on_cuda_hift_is_on_the_host_and_graphs_are_captured(simulated, config, monkeypatch):
    monkeypatch.setattr(overlay, "SMALLEST", 256)
    model = simulated.get("english")
    module = model.s3gen.mel2wav

    def kinds():
        return {p.device.type for p in module.parameters() if p.nbytes > 256}

    turbo.apply(model, {**config, "decoding": {"enabled": False}})
    assert kinds() == {"cpu"} and "left for the host's memory" in str(model.turbo.report())
    engine, mel = model.turbo._engines.vocoder, frames(20).cuda()
    assert {t.device.type for t in engine.tensors} == {"cuda"}
    plain = vocode(model, mel)[0]
    engine.network.pays_after = 0
    with simulated.machine.watching() as seen:
        first = vocode(model, mel)[0]
        again = vocode(model, mel)[0]
    assert seen.counts["captures"] == 1 and engine.network.runner.captured == [(32, 1, True)]
    assert not [one for one in seen.waits if one.kind == "sync" and "vocos" in one.place]
    assert snr_db(first.cpu(), plain.cpu()) > 100 and torch.equal(again.cpu(), first.cpu())
    wav = spoken(model)
    turbo.apply(model, {**config, "decoding": {"enabled": False}, "offload": {"mode": "sequential"}})
    assert {t.device.type for t in model.turbo._engines.vocoder.tensors if t.nbytes > 256} == {"cpu"}
    assert snr_db(spoken(model).cpu(), wav.cpu()) > 60 and kinds() == {"cpu"}
    assert turbo.inspect(model, config).step("vocoder").status == "on" and model.turbo.renewals == ()
    turbo.revert(model)
    assert kinds() == {"cuda"}
