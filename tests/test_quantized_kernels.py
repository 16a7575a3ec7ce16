"""Products with int8 and int4 matrices: their error, rows that do not depend on each other, the step over them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.cpu import instructions
from chatterbox_turbo.runtime.cpu.arrays import arrays
from chatterbox_turbo.runtime.cpu.products import project, project_gated, project_gelu
from chatterbox_turbo.runtime.cpu.quantized_linear import FEW, prepare, quantized_linear, scratch
from chatterbox_turbo.runtime.cpu.quantized_products import why_not
from chatterbox_turbo.runtime.cpu.threads import kernel_threads
from chatterbox_turbo.runtime.device.rounding import quantize
from chatterbox_turbo.runtime.t3.backbone import StaticBackbone, TorchStep
from chatterbox_turbo.runtime.t3.cpu_step import CpuStep, unsuitable
from chatterbox_turbo.upstream import t3_weights

SCHEMES = ("int8", "int4")
FLOORS = {("int8", True): 88, ("int4", True): 41, ("int8", False): 115, ("int4", False): 115}  # dB, by integers


@pytest.fixture(params=[True, False], ids=["integers", "fp32"])
def integers(request, monkeypatch):
    """Both ways of multiplying: the processor's instructions for integers, and fp32 for those that have none."""
    if request.param and not instructions.multiplies_integers():
        pytest.skip("this processor has no AVX-512 VNNI, or numba compiles for another one")
    monkeypatch.setattr(instructions, "multiplies_integers", lambda: request.param)
    return request.param


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(matrix, x):
    return x.double() @ matrix.dequantize(torch.float32).double().T


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_of_any_number_of_rows(scheme, integers):
    """Against fp64 on the dequantized matrix; a row is the same whatever is beside it; a wrong matrix is far away."""
    for outputs, inner in ((7, 128), (50, 256), (33, 1152)):
        matrix, x = quantize(numbers(outputs, inner), scheme), numbers(FEW, inner, seed=1)
        scale = torch.ones(FEW, 1)
        scale[3] = 1e4  # a loud neighbour
        scale[4] = 0.0
        x = x * scale
        right = plain(matrix, x)
        alone = torch.cat([quantized_linear(matrix, row[None]) for row in x])
        loud = [row for row in range(FEW) if row != 4]
        assert not alone[4].any()
        assert snr_db((alone / scale)[loud].double(), (right / scale)[loud]) > FLOORS[scheme, integers]
        assert snr_db(alone[0].double(), plain(matrix, -x)[0]) < 0
        for rows in (1, 2, 3, 4, 5, 8, FEW):
            assert torch.equal(quantized_linear(matrix, x[:rows]), alone[:rows]), rows
            assert torch.equal(quantized_linear(matrix, x[FEW - rows :]), alone[FEW - rows :]), rows


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_and_activations(scheme, integers):
    matrix, x, bias = quantize(numbers(96, 256) / 8, scheme), numbers(5, 256, seed=1), numbers(96, seed=2)
    right, floor = plain(matrix, x), FLOORS[scheme, integers] - 6
    with kernel_threads():
        w, y = arrays(matrix), np.empty((5, 96), np.float32)
        given, result = prepare(x.numpy(), w, scratch(5, 256)), torch.from_numpy(y)
        project(w, bias.numpy(), given, y, 2)
        assert snr_db(result.double(), right + bias) > floor
        project_gelu(w, bias.numpy(), given, y, 2)
        assert snr_db(result.double(), F.gelu(right + bias, approximate="tanh")) > floor
        project_gated(w, given, y, 2)
        assert snr_db(result[:, :48].double(), F.silu(right[:, :48]) * right[:, 48:]) > floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_of_many_rows(scheme, dtype):
    """As ``linear`` with the dequantized matrix, which is made block by block: no copy of it as a whole."""
    matrix, x = quantize(numbers(2100, 256), scheme), numbers(2, FEW, 256, seed=1).to(dtype)
    y = quantized_linear(matrix, x)
    assert y.shape == (2, FEW, 2100) and y.dtype == dtype
    right = F.linear(x.double(), matrix.dequantize(dtype).double())
    assert snr_db(y.double(), right) > (100 if dtype == torch.float32 else 45)


def test_what_the_kernels_do_not_multiply_by():
    assert not why_not("int8", 1024) and not why_not("int4", 4096)
    assert "nf4" in why_not("nf4", 1024)
    assert "192" in why_not("int8", 192) and "32768" in why_not("int4", 32768)


@pytest.mark.parametrize("family", ["english", "turbo"])
def test_the_step_over_layers_of_several_formats(models, family, request):
    """Against the same step in torch, whose error against the plain weights is another."""
    t3, journal = models(family).t3, Journal()
    request.addfinalizer(journal.undo)
    t3_weights.fuse(t3, journal)
    weights = t3_weights.read(t3)
    layer = weights.layers[0]
    schemes = {"qkv": "int8", "up": "int4", "down": "int8"}
    given = {
        name: replace(getattr(layer, name), weight=quantize(getattr(layer, name).weight, scheme))
        for name, scheme in schemes.items()
    }
    plain = replace(weights, layers=(layer, layer))
    mixed = replace(weights, layers=(layer, replace(layer, **given)))
    assert not unsuitable(mixed) and mixed.schemes == ("int4", "int8")
    embeds, results = numbers(3, mixed.width), []
    for step_weights, step in ((plain, TorchStep(plain)), (mixed, TorchStep(mixed)), (mixed, CpuStep(mixed))):
        backbone = StaticBackbone(step_weights, step)
        with torch.inference_mode():
            backbone.begin(3, 1)
            for row in embeds:
                backbone.admit([row.expand(1, 5, -1)], [1])
            results.append(backbone.step(embeds)[0])
    assert snr_db(results[2], results[1]) > snr_db(results[0], results[1]) + 10
