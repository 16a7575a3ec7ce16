"""Vocos as the vocoder: the package's samples, batches, windows, graphs, HiFT's weights away and back, refusals."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from cases import difference, onlooker, snapshot, speak
from test_vocos_checkpoint import MEL, SMALL, altered

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError, ModelUnavailableError, UnavailablePassError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.measure.streaming import given
from chatterbox_turbo.runtime.cpu import cold
from chatterbox_turbo.runtime.device import overlay
from chatterbox_turbo.runtime.s3gen import vocoder as hift
from chatterbox_turbo.runtime.s3gen.graphed import bucketed
from chatterbox_turbo.runtime.s3gen.streaming import AcousticStream, Windows
from chatterbox_turbo.runtime.s3gen.vocos_checkpoint import NAME, WEIGHTS, load, write
from chatterbox_turbo.runtime.s3gen.vocos_network import VocosArchitecture, build
from chatterbox_turbo.runtime.s3gen.vocos_vocoder import StreamedVocos, VocosDecoder, coefficients, samples_of

LIMIT = 0.99


def loud(architecture=SMALL, seed=7):
    """A network whose blocks count: initial weights of the package are small, and its layers scaled down."""
    torch.manual_seed(seed)
    network = build(architecture, MEL).eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=(weight[0].numel()) ** -0.5)
        elif name.endswith("gamma"):
            weight.fill_(0.5)
        elif not name.endswith("norm.weight"):
            weight.normal_(std=0.1)
    return network


def frames(count, seed=0, rows=1):
    return torch.randn(rows, 80, count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return loud()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocos") / "vocoder"
    write(folder, network, {"log-mel distance": 0.25}, {})
    return folder


@pytest.fixture(scope="module")
def config(checkpoint):
    return settings(checkpoint)


def settings(folder, **more):
    vocoder = {"enabled": True, "kind": "vocos", "checkpoint": str(folder), **more.pop("vocoder", {})}
    return {"fidelity": "lossy", "decoding": {"progress": "off"}, "vocoder": vocoder, **more}


def vocode(model, mel):
    return model.s3gen.mel2wav.inference(speech_feat=mel)


# --- what it computes


@pytest.mark.parametrize("n_fft", [1920, 1600, 960])
@torch.inference_mode()
def test_samples_are_those_of_the_packages_own_layers(n_fft):
    own = loud(replace(SMALL, n_fft=n_fft))
    for rows, count in ((1, 1), (2, 9)):
        mel = 3 * frames(count, rows=rows)
        expected = own(mel)
        found = VocosDecoder(own, 1e9).synthesize(mel)
        assert found.shape == expected.shape == (rows, 480 * count)
        assert expected.std() > 1e-3 and snr_db(found, expected) > 100
        assert VocosDecoder(own, 1e-3).synthesize(mel).abs().max() == 1e-3


@torch.inference_mode()
def test_a_batch_gives_each_what_it_gets_alone(network, monkeypatch):
    decoder, mels = VocosDecoder(network, LIMIT), [frames(count, count) for count in (5, 12, 9)]
    alone = [decoder.synthesize(mel) for mel in mels]
    for found, expected in zip(decoder.synthesize_all(mels), alone, strict=True):
        assert found.shape == expected.shape and snr_db(found, expected) > 100
    unmasked = VocosDecoder(network, LIMIT, function=lambda network, mel, valid: coefficients(network, mel))
    assert snr_db(unmasked.synthesize_all(mels)[0], alone[0]) < 60


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
@torch.inference_mode()
def test_lengths_that_a_graph_pads_give_the_same(network, count):
    plain, padding = VocosDecoder(network, LIMIT), VocosDecoder(network, LIMIT)
    padding.longest, padding.pays_after = VocosDecoder.longest, 0
    mel = frames(count)
    assert snr_db(padding.synthesize(mel), plain.synthesize(mel)) > 100
    assert padding.runner.captured == [(bucketed(count), 1, True)]


def test_it_is_compiled_in_one_piece_for_all_lengths(network):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    traced = torch.compile(coefficients, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for count in (20, 33, 7):
            assert snr_db(traced(network, frames(count)), coefficients(network, frames(count))) > 100
    assert counter.frame_count == 1


# --- how far it sees


def depends(architecture):
    """Mel frames before and behind that the samples of a frame depend on, found by changing one frame."""
    network, count = loud(architecture).double(), 2 * architecture.reach + 9
    middle = count // 2
    mel = frames(count).double()
    changed = mel.clone()
    changed[:, :, middle] += 5
    with torch.no_grad():
        before, after = (samples_of(network, coefficients(network, each), 1e9)[0] for each in (mel, changed))
    moved = (before != after).view(count, -1).any(dim=1).nonzero().flatten() - middle
    return -moved.min().item(), moved.max().item()


@pytest.mark.parametrize(
    ("size", "frames_seen"),
    [
        ({"layers": 1}, 8),
        ({"layers": 8, "dim": 16}, 29),  # as many as the full size: width changes nothing
        ({"layers": 2, "n_fft": 960}, 10),
    ],
)
def test_the_receptive_field_is_what_the_architecture_says(size, frames_seen):
    architecture = replace(SMALL, **size)
    assert depends(architecture) == (frames_seen, frames_seen) == (architecture.reach,) * 2
    assert VocosArchitecture().reach == 29


def streamed(network, windows, tokens=60):
    """Samples of an utterance by windows, and of the whole, from the same mel frames."""
    mel, decoder = frames(2 * tokens, 3), VocosDecoder(network, LIMIT)
    options = {"reach": network.architecture.reach}
    stream = AcousticStream(
        lambda tokens, first, noise: noise, StreamedVocos(lambda: decoder), given(mel), windows, **options
    )
    with torch.inference_mode():
        return torch.cat(list(stream.run(torch.zeros(tokens, dtype=torch.int64).split(7)))), decoder.synthesize(mel)[0]


def test_a_stream_that_holds_back_what_it_reaches_gives_the_whole(network):
    reach = network.architecture.reach
    for first in (15, 4):
        found, whole = streamed(network, Windows(first_chunk=first, held=reach, faded=0))
        assert found.shape == whole.shape and snr_db(found, whole) > 100
    less = streamed(network, Windows(held=4))
    assert snr_db(*less) < 60, "the reach is not needed"


# --- in a model


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


# --- what is refused


@pytest.mark.parametrize(
    ("vocoder", "fidelity", "said"),
    [
        ({"kind": "vocos"}, "lossy", "vocoder.checkpoint is not set"),
        ({"kind": "vocos", "checkpoint": ""}, "lossy", "vocoder.checkpoint is not set"),
        ({"checkpoint": "folder"}, "lossy", 'vocoder.kind is "hift"'),
        ({"kind": "vocos", "checkpoint": "folder", "enabled": False}, "lossy", "vocoder.enabled is false"),
        ({"kind": "vocos", "checkpoint": "folder"}, "exact", 'lossy, above the ceiling fidelity = "exact"'),
        ({"kind": "vocos", "checkpoint": "folder"}, "numerical", "above the ceiling"),
        ({"kind": "bigvgan"}, "lossy", "vocos"),
    ],
)
def test_configurations_that_contradict_themselves(vocoder, fidelity, said):
    with pytest.raises(InvalidConfigError, match=said):
        turbo.OptimizationConfig(fidelity=fidelity, vocoder=vocoder)


@pytest.fixture
def own(checkpoint, tmp_path):
    """A checkpoint that may be damaged."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in (NAME, WEIGHTS):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return folder


def flip(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: altered(folder, lambda c: c["mel"].update(bands=100)), r"bands +80 +100 +<- differs"),
        (lambda folder: altered(folder, lambda c: c["architecture"].update(layers=1)), "does not fit VocosNetwork"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"cut"), "It is cut off"),
        (flip, "is damaged"),
        (lambda folder: (folder / NAME).unlink(), "no vocoder checkpoint"),
    ],
)
def test_a_bad_checkpoint_leaves_the_model_as_it_was(english, own, damage, said):
    before = snapshot(english)
    damage(own)
    with pytest.raises(ModelUnavailableError, match=said):
        turbo.apply(english, settings(own))
    assert not hasattr(english, "turbo") and difference(before, snapshot(english)) == []


def test_without_the_package_it_is_skipped_or_refused(english, config, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "vocos", None)
    for name in [name for name in sys.modules if name.startswith("vocos.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UnavailablePassError, match=r"vocos is not installed; Run: pip install"):
        turbo.apply(english, config)
    step = turbo.inspect(english, settings(checkpoint, vocoder={"enabled": "auto"})).step("vocoder")
    assert step.status == "skipped" and "pip install" in step.reason


def test_unknown_mel_frames_are_a_reason(english, config, monkeypatch):
    monkeypatch.setattr(english.s3gen, "mel_extractor", lambda samples: samples)
    with pytest.raises(UnavailablePassError, match="mel frames is not a known one"):
        turbo.apply(english, config)


@pytest.mark.usefixtures("no_hub")
def test_a_repository_that_cannot_be_had_is_named(english):
    with pytest.raises(ModelUnavailableError, match=r"(?s)somebody/vocos-s3gen.*Connect to the hub once"):
        turbo.apply(english, settings("somebody/vocos-s3gen"))
    with pytest.raises(ModelUnavailableError, match="a repository of the hub"):
        turbo.apply(english, settings("/no/such/folder"))


def test_a_repository_is_asked_for_two_files_and_for_the_weights_last(english, own, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(list(allow_patterns))
        return str(own)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    turbo.apply(english, settings("somebody/vocos-s3gen"))
    assert asked == [[NAME], [NAME, WEIGHTS]]
    turbo.revert(english)
    asked.clear()
    altered(own, lambda content: content["mel"].update(bands=100))
    with pytest.raises(ModelUnavailableError, match="differs"):
        turbo.apply(english, settings("somebody/vocos-s3gen"))
    assert asked == [[NAME]]
