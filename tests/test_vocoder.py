"""The vocoder: samples, source and random numbers to the bit, cached sources, moved weights, padding, compiled code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrize

import chatterbox_turbo as turbo
from chatterbox_turbo import OptimizationConfig, synthetic
from chatterbox_turbo.config import VocoderSection
from chatterbox_turbo.errors import UnsupportedModelError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.passes.base import Context
from chatterbox_turbo.passes.vocoder import Vocoder, VocoderPass
from chatterbox_turbo.runtime.memory.clearing import CachePolicy
from chatterbox_turbo.runtime.s3gen import vocoder_network
from chatterbox_turbo.runtime.s3gen.graphed import bucketed
from chatterbox_turbo.runtime.s3gen.vocoder import synthesize
from chatterbox_turbo.runtime.s3gen.vocoder_network import Network
from chatterbox_turbo.upstream import vocoder_weights
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.patch_points import LLAMA

WHOLE = {"upsampling": "whole", "layout": "channels_first"}
ALONE = {"vocoder": {"enabled": True, **WHOLE}, "flow": {"enabled": False}}


def run(model, mel, **options):
    torch.manual_seed(3)
    samples, source = model.s3gen.mel2wav.inference(speech_feat=mel, **options)
    return samples.clone(), source.clone(), torch.rand(1)


@pytest.fixture
def vocoder(models):
    """A model, and a function that runs its vocoder as upstream and as optimized."""
    model = models(LLAMA[0])

    def both(mel, **options):
        expected = run(model, mel, **options)
        with turbo.optimized(model, ALONE):
            return expected, run(model, mel, **options)

    return both


@pytest.mark.parametrize("frames", [1, 2, 50, 333])
@pytest.mark.parametrize("rows", [1, 2])
def test_samples_source_and_generator_are_equal(vocoder, frames, rows):
    mel = torch.randn(rows, 80, frames, generator=torch.Generator().manual_seed(frames))
    expected, given = vocoder(mel)
    assert all(torch.equal(a, b) for a, b in zip(expected, given, strict=True))


def test_a_cached_source_goes_on(vocoder):
    mel = torch.randn(1, 80, 20, generator=torch.Generator().manual_seed(0))
    expected, given = vocoder(mel, cache_source=torch.full((1, 1, 480), 0.1))
    assert all(torch.equal(a, b) for a, b in zip(expected, given, strict=True))
    assert (given[1][..., :480] == 0.1).all()


def test_loud_and_voiced_input(vocoder):
    """Pitches above the voiced threshold, and magnitudes that upstream clips."""
    expected, given = vocoder(30 * torch.randn(1, 80, 40, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(a, b) for a, b in zip(expected, given, strict=True))


def test_parametrizations_stay_and_changed_weights_are_read_anew(models):
    model = models(LLAMA[0])
    module, mel = model.s3gen.mel2wav, torch.randn(1, 80, 10)
    keys = list(module.state_dict())
    before = run(model, mel)[0]
    weight = module.conv_pre.parametrizations.weight.original1
    kept = weight.data
    with turbo.optimized(model, ALONE):
        assert list(module.state_dict()) == keys
        try:
            weight.data = kept * torch.linspace(0.5, 2.0, kept.size(1))[None, :, None]
            changed = run(model, mel)[0]
        finally:
            weight.data = kept
        assert not torch.equal(changed, before)
        assert torch.equal(run(model, mel)[0], before)


def test_folded_weights_and_removed_normalization_give_the_same():
    """Folding, as on a GPU; and a vocoder whose user has folded it already."""
    module = synthetic.build(LLAMA[0], "tiny").s3gen.mel2wav  # its own: parametrized copies share a class
    mel = torch.randn(1, 80, 30, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        lean, folded = (vocoder_weights.read(module, fold=fold) for fold in (False, True))
        assert lean.network.before.magnitude is not None and folded.network.before.magnitude is None
        results = [sound(lean, mel), sound(folded, mel)]
        for part in module.modules():
            if parametrize.is_parametrized(part):
                parametrize.remove_parametrizations(part, "weight")
        results.append(sound(vocoder_weights.read(module, fold=False), mel))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def sound(weights, mel):
    torch.manual_seed(1)
    return synthesize(weights, Network(weights.network), mel, None)[0]


def test_another_parametrization_is_refused(models):
    module = copy.deepcopy(models(LLAMA[0]).s3gen.mel2wav)
    module.conv_pre.parametrizations.weight[0].dim = 1
    with pytest.raises(UnsupportedModelError, match="parametrizations"):
        vocoder_weights.check(module)


@pytest.fixture
def networks(models):
    """The network as it is, and as graphs ask for: with lengths padded, but without graphs."""
    weights = vocoder_weights.read(models(LLAMA[0]).s3gen.mel2wav, fold=False)
    plain, padding = Network(weights.network), Network(weights.network)
    padding.longest, padding.pays_after = Network.longest, 0
    return plain, padding


def through(network, frames):
    """The network's result for random frames and a random spectrum of the source."""
    generator = torch.Generator().manual_seed(frames)
    mel, spectrum = (torch.randn(1, *size, generator=generator) for size in ((80, frames), (18, 120 * frames + 1)))
    return network(mel, spectrum)


@pytest.mark.parametrize("frames", [1, 2, 31, 32, 33, 70])
def test_lengths_that_a_graph_pads_give_the_same(networks, frames):
    plain, padding = networks
    given, expected = through(padding, frames), through(plain, frames)
    assert given.shape == expected.shape == (1, 18, 120 * frames + 1)
    assert snr_db(given, expected) > 120
    assert padding.runner.captured == [(bucketed(frames), 1, True)]


@pytest.mark.parametrize("index", range(4))
def test_each_mask_is_needed(networks, monkeypatch, index):
    """The mask of one resolution lets the padding through."""
    masks, (plain, padding) = vocoder_network._masks, networks

    def leaking(*args):
        return [torch.ones_like(mask) if at == index else mask for at, mask in enumerate(masks(*args))]

    monkeypatch.setattr(vocoder_network, "_masks", leaking)
    assert snr_db(through(padding, 33), through(plain, 33)) < 100


@pytest.mark.parametrize(
    "device, ceiling, options, promise",
    [
        ("cpu", "numerical", {}, "numerical"),
        ("cpu", "numerical", WHOLE, "exact"),
        ("cpu", "numerical", {"upsampling": "whole"}, "numerical"),
        ("cpu", "exact", {}, "exact"),
        ("cpu", "numerical", {"compile": True, **WHOLE}, "numerical"),
        ("cuda", "numerical", {}, "numerical"),
        ("cuda", "numerical", {"graphs": False}, "exact"),
        ("cuda", "exact", {}, "exact"),
    ],
)
def test_the_promise_is_that_of_the_device_and_the_ceiling(models, monkeypatch, device, ceiling, options, promise):
    parts, config = identify(models(LLAMA[0])), OptimizationConfig(fidelity=ceiling, vocoder=options)
    monkeypatch.setattr(type(parts), "device", torch.device(device))
    assert VocoderPass().fidelity(Context(parts, config)) == promise


@pytest.mark.parametrize(
    "options, said",
    [
        (WHOLE, ""),
        ({**WHOLE, "graphs": False}, ""),
        ({}, "channels last, upsampling by products"),
        ({"layout": "channels_first"}, "upsampling in pieces"),
        ({"upsampling": "whole"}, "channels last"),
        ({"compile": True}, "compiled"),
    ],
)
def test_the_report_says_what_computes_and_revert_gives_it_back(models, options, said):
    model = models(LLAMA[0])
    with turbo.optimized(model, {"vocoder": {"enabled": True, **options}}):
        step, vocoder = model.turbo.plan.step("vocoder"), model.turbo._engines.vocoder
        assert (step.reason, step.fidelity) == (said, "numerical" if said else "exact")
        network = vocoder.network
        if options == WHOLE:
            run(model, torch.randn(1, 80, 3))
            assert network._eager.captured == [(3, 1, False)]  # nothing is padded where nothing is captured
    assert vocoder.network is None and network.runner.captured == []


def small():
    """Upstream's vocoder in a size that a compiler is done with in seconds."""
    from chatterbox.models.s3gen.f0_predictor import ConvRNNF0Predictor
    from chatterbox.models.s3gen.hifigan import HiFTGenerator

    torch.manual_seed(0)
    module = HiFTGenerator(
        sampling_rate=24000,
        base_channels=16,
        upsample_rates=[4, 2],
        upsample_kernel_sizes=[8, 4],
        source_resblock_kernel_sizes=[3, 3],
        source_resblock_dilation_sizes=[[1], [1]],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[3]],
        f0_predictor=ConvRNNF0Predictor(cond_channels=16),
    )
    return module.eval()


def spoken(vocoder, frames):
    torch.manual_seed(frames)
    return vocoder.speak(torch.randn(1, 80, frames, device=vocoder._module.conv_pre.bias.device))[0]


@pytest.mark.exhaustive
def test_compiled_code_gives_the_same_in_one_piece():
    from torch._dynamo.utils import counters

    plain, compiled = (
        Vocoder(small(), VocoderSection(compile=compile, **WHOLE), "numerical", CachePolicy())
        for compile in (False, True)
    )
    assert (plain.prepare(), compiled.prepare()) == ("", "compiled")
    counters.clear()
    for frames in (20, 33, 7):
        given, expected = spoken(compiled, frames), spoken(plain, frames)
        assert given.shape == expected.shape and snr_db(given, expected) > 100
        assert not torch.equal(given, expected), "nothing was compiled"
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # one for all lengths


def test_without_a_compiler_it_is_not_compiled_and_says_why():
    from torch._inductor import config

    plain, compiled = (
        Vocoder(small(), VocoderSection(compile=compile, **WHOLE), "numerical", CachePolicy())
        for compile in (False, True)
    )
    plain.prepare()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert compiled.prepare().startswith("not compiled: no C++ compiler: InvalidCxxCompiler")
    assert torch.equal(spoken(compiled, 20), spoken(plain, 20))


@pytest.mark.gpu
def test_graphs_give_what_eager_gives():
    eager, graphs = (
        Vocoder(small().cuda(), VocoderSection(), ceiling, CachePolicy()) for ceiling in ("exact", "numerical")
    )
    assert "no CUDA graphs" in eager.prepare() and graphs.prepare() == "CUDA graphs"
    graphs.network.pays_after = 0
    lengths = (1, 20, 32, 20, 33, 1)
    given = [spoken(graphs, frames) for frames in lengths]  # all of them before the first is looked at
    for frames, samples in zip(lengths, given, strict=True):
        assert snr_db(samples.cpu(), spoken(eager, frames).cpu()) > 60
    runner = graphs.network.runner
    assert set(runner.captured) == {(16, 1, True), (32, 1, True), (48, 1, True)} and not runner.fallbacks
    with torch.no_grad():
        graphs._module.conv_pre.bias.data = graphs._module.conv_pre.bias.data + 1.0  # other storage
    assert snr_db(spoken(graphs, 20).cpu(), given[1].cpu()) < 60
    assert graphs.network.runner is not runner and runner.captured == []
