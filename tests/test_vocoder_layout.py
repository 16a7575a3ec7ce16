"""The vocoder with channels last: the same samples, by kernels and without; to the bit where the ceiling asks it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import only, speak

import chatterbox_turbo as turbo
from chatterbox_turbo.config import VocoderSection
from chatterbox_turbo.errors import InvalidConfigError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.passes.vocoder import channels_last
from chatterbox_turbo.runtime.cpu import vocoder_kernels as kernels
from chatterbox_turbo.runtime.cpu.arrays import array
from chatterbox_turbo.runtime.cpu.onednn import wants_channels_last
from chatterbox_turbo.runtime.s3gen import vocoder_network
from chatterbox_turbo.runtime.s3gen.vocoder_network import Network
from chatterbox_turbo.upstream import vocoder_weights
from chatterbox_turbo.upstream.patch_points import LLAMA


@pytest.fixture
def networks(models):
    """Of one vocoder: ``networks(channels_last, ...)``, further arguments as of ``vocoder_weights.read``."""
    module = models(LLAMA[0]).s3gen.mel2wav

    def make(channels_last, **options):
        return Network(vocoder_weights.read(module, fold=False, channels_last=channels_last, **options).network)

    return make


def inputs(rows, frames):
    generator = torch.Generator().manual_seed(frames)
    return [torch.randn(rows, *size, generator=generator) for size in ((80, frames), (18, 120 * frames + 1))]


@pytest.mark.parametrize("rows, frames, lengths", [(1, 1, None), (1, 2, None), (2, 33, None), (3, 40, [40, 1, 17])])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("compiles", [True, False])
def test_the_layout_changes_rounding_alone(networks, monkeypatch, rows, frames, lengths, pieces, compiles):
    given = inputs(rows, frames)
    if lengths:
        for row, length in enumerate(lengths):
            given[0][row, :, length:] = 0.0
            given[1][row, :, 120 * length + 1 :] = 0.0
    with torch.inference_mode():
        expected = networks(False)(*given, lengths)
        if not compiles:
            monkeypatch.setattr(vocoder_network, "_kernels", lambda: None)
        found = networks(True, pieces=pieces)(*given, lengths)
    assert found.shape == expected.shape
    for row, length in enumerate(lengths or [frames] * rows):
        end = 120 * length + 1
        assert snr_db(found[row, :, :end], expected[row, :, :end]) > 100


@pytest.mark.parametrize("compiles", [True, False])
def test_half_precision_leaves_the_same_error_in_either(networks, monkeypatch, compiles):
    given = inputs(2, 30)
    if not compiles:
        monkeypatch.setattr(vocoder_network, "_kernels", lambda: None)
    with torch.inference_mode():
        expected = networks(False)(*given)
        first, last = (networks(layout, residual=torch.bfloat16, pieces=True)(*given) for layout in (False, True))
        fp16 = networks(True, residual=torch.float16)(*given)  # for which there are no kernels
    errors = [snr_db(one, expected) for one in (first, last)]
    assert min(errors) > 30 and abs(errors[0] - errors[1]) < 3
    assert snr_db(fp16, expected) > 45
    weight = networks(True, residual=torch.bfloat16).weights.levels[0].blocks[0].steps[0][1].direction
    assert weight.transpose(1, 2).is_contiguous(), "a copy lies as it is read"


def test_no_convolution_of_a_residual_block_adds_zeros_of_its_own(networks, monkeypatch):
    """For which oneDNN compiles much for each new length."""
    seen, conv2d = [], torch.nn.functional.conv2d

    def noted(x, weight, bias, **options):
        if weight.dtype == torch.bfloat16:
            seen.append(options["padding"])
        return conv2d(x, weight, bias, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", noted)
    network = networks(True, residual=torch.bfloat16, pieces=True)
    network(*inputs(1, 20))
    levels = network.weights.levels
    steps = sum(len(block.steps) for level in levels for block in (level.source_block, *level.blocks))
    assert seen == [(0, 0)] * (2 * steps)


def test_activations_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    for rows, channels, size in ((1, 1, 1.0), (65, 3, 10.0), (200, 64, 1000.0)):
        x, more = (size * torch.randn(rows, channels, generator=generator) for _ in range(2))
        alpha = torch.rand(channels, generator=generator) * 4 + 0.1
        inverse = 1 / alpha

        def snake(x, alpha=alpha, inverse=inverse):
            x = x.double()
            return x + inverse * torch.sin(alpha.double() * x) ** 2

        result, half, total = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bfloat16), x.clone()
        kernels.activate(array(x), array(result), array(alpha), array(inverse))
        # the argument itself has an error of half a unit in its last place
        unit = torch.finfo(torch.float32).eps * (alpha * x).abs().max() / alpha.min()
        assert (result - snake(x)).abs().max() < unit + 2e-6 * (1 + x.abs().max())
        kernels.activate(array(x), array(half), array(alpha), array(inverse))
        assert torch.equal(half, result.bfloat16())
        kernels.add_and_activate(array(total), array(result), array(more), array(alpha), array(inverse))
        assert torch.equal(total, x + more)
        again = torch.empty_like(x)
        kernels.activate(array(total), array(again), array(alpha), array(inverse))
        assert torch.equal(result, again)
        in_place = half.clone()
        kernels.activate(array(in_place), array(in_place), array(alpha), array(inverse))
        kernels.activate(array(half), array(result), array(alpha), array(inverse))
        assert torch.equal(in_place, result.bfloat16())


def test_a_sine_that_is_no_number_stays_one():
    x = torch.tensor([[float("nan")], [1.0]])
    result, one = torch.empty_like(x), torch.ones(1)
    kernels.activate(array(x), array(result), array(one), array(one))
    assert np.isnan(result[0, 0]) and abs(float(result[1, 0]) - 1 - np.sin(1.0) ** 2) < 1e-6


@pytest.mark.parametrize("model", ["turbo"], indirect=True)
@pytest.mark.parametrize(
    "fidelity, layout", [("numerical", "auto"), ("exact", "auto"), ("numerical", "channels_first")]
)
def test_the_ceiling_chooses_the_layout(model, fidelity, layout):
    expected = speak(model, 3)
    turbo.apply(
        model,
        {**only(), "fidelity": fidelity, "vocoder": {"enabled": True, "upsampling": "whole", "layout": layout}},
    )
    found, last = speak(model, 3), (fidelity, layout) == ("numerical", "auto")
    assert ("channels last" in str(model.turbo.report())) == last
    assert model.turbo.plan.step("vocoder").fidelity == ("numerical" if last else "exact")
    assert torch.equal(found, expected) != last and snr_db(expected, found) > 60


def test_where_nobody_has_measured_it_the_layout_is_upstreams(monkeypatch):
    section = VocoderSection()
    assert channels_last(section, "numerical", torch.device("cpu")) == wants_channels_last()
    for capability in ("DEFAULT", "NO AVX", "SVE256"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert not channels_last(section, "numerical", torch.device("cpu"))
    demanded = VocoderSection(layout="channels_last")
    assert channels_last(demanded, "numerical", torch.device("cpu"))
    assert not channels_last(demanded, "numerical", torch.device("cuda"))


@pytest.mark.parametrize("model", ["turbo"], indirect=True)
def test_channels_last_are_above_the_ceiling_exact(model):
    with pytest.raises(InvalidConfigError, match="vocoder"):
        turbo.apply(model, {"fidelity": "exact", "vocoder": {"enabled": True, "layout": "channels_last"}})
