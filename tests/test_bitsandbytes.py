"""bitsandbytes' own kernels on this CPU: its layout is ours, its products are right, models speak by them."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import only, request_for, speak
from snapshots import difference, snapshot

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import UnavailablePassError
from chatterbox_turbo.runtime.device import bitsandbytes as kernels
from chatterbox_turbo.runtime.device.quantized import SCHEMES
from chatterbox_turbo.runtime.device.rounding import quantize
from chatterbox_turbo.runtime.quantization import backend_for

# before a test simulates a GPU, for which it would load a library
bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.50", reason="bitsandbytes 0.50 is not installed")

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
LEAST_DB = {torch.float32: 120, torch.bfloat16: 45, torch.float16: 60}
pytestmark = pytest.mark.filterwarnings("ignore::chatterbox_turbo.errors.SpeechTruncatedWarning")


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def db(y, reference):
    return float(10 * torch.log10(reference.double().square().sum() / (y - reference).double().square().sum()))


@pytest.mark.parametrize("scheme", kernels.SCHEMES)
def test_codes_scales_and_numbers_are_its_own_to_the_bit(scheme):
    assert torch.equal(bitsandbytes.functional.get_4bit_type(scheme, device="cpu"), SCHEMES[scheme].table())
    for dtype in kernels.FORMATS:
        weight = (weights(96, 256) * 0.02).to(dtype)
        weight[3, 64:128] = 0
        matrix = quantize(weight, scheme)
        codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type=scheme)
        assert torch.equal(codes.flatten(), matrix.codes.flatten())
        assert torch.equal(state.absmax, matrix.scales.flatten())
        assert torch.equal(bitsandbytes.functional.dequantize_4bit(codes, state), matrix.dequantize(dtype))


@pytest.mark.parametrize("scheme, least", [("nf4", 20.5), ("fp4", 18.0)])
def test_products_are_the_matrix_times_the_rows(scheme, least):
    weight = weights(192, 256)
    whole = quantize(weight, scheme)
    assert db(whole.dequantize(), weight) > least
    for by in (kernels.multiply, kernels.multiply_rows):
        for matrix in (whole, whole.rows(64, 128)):
            exact = matrix.dequantize().double().t()
            for dtype, decibels in LEAST_DB.items():
                for x in (weights(1, 256), weights(2, 256), weights(2, 9, 256), weights(256, 3).t()):
                    y = by(matrix, x.to(dtype))
                    assert y.dtype == dtype
                    assert db(y.double(), x.to(dtype).double() @ exact) > decibels


@pytest.mark.parametrize("by", [kernels.multiply, kernels.multiply_rows])
def test_what_its_kernels_do_not_compute_is_computed_all_the_same(by):
    matrix = quantize(weights(64, 128), "nf4")
    x = weights(2, 128)
    torch.testing.assert_close(by(matrix, x.double()), x.double() @ matrix.dequantize(torch.float64).t())
    assert by(matrix, x[:0]).shape == (0, 64)
    x.requires_grad_()
    by(matrix, x).sum().backward()
    torch.testing.assert_close(x.grad[0], matrix.dequantize().sum(0))


def config(scheme="nf4", backend="bitsandbytes", **decoding):
    section = {"enabled": True, "t3": scheme, "backend": backend, "strategy": "aggressive"}
    decoding = {"enabled": True, "progress": "off", "kernel": "torch", **decoding}
    return {**only(), "fidelity": "lossy", "quantization": section, "decoding": decoding}


@pytest.mark.parametrize("family, scheme", [("english", "nf4"), ("turbo", "fp4")])
def test_models_speak_as_with_the_matrices_in_full_and_are_left_as_they_were(fresh, family, scheme):
    model = fresh(family)
    plain, spoken = speak(model), {}  # leaves upstream's own submodule
    before = snapshot(model)
    items = [request_for(model, text) for text in ("One.", "And two.", "Three.")]
    for backend in ("bitsandbytes", "torch"):
        turbo.apply(model, config(scheme, backend))
        said = "bitsandbytes" in str(model.turbo.report())
        assert said == (backend == "bitsandbytes")
        spoken[backend] = [speak(model), *model.turbo.batch(items)]
        turbo.revert(model)
        assert [path for path in difference(before, snapshot(model)) if "patched_model" not in path] == []
    assert all(torch.equal(one, other) for one, other in zip(*spoken.values(), strict=True))
    assert not torch.equal(spoken["torch"][0], plain)


@pytest.fixture
def kernels_for_cuda():
    """Its operator as registered for CUDA, which no simulated tensor reaches: they compute on the CPU."""
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit", lambda *operands: pytest.fail("computed on a GPU"), "CUDA")
    yield
    library._destroy()


def one_row(calls):
    """``gemv_4bit`` as it is on CUDA: on CPUs its operands are laid out differently."""

    def gemv(x, codes, shape, scales, table, group):
        assert x.size(0) == 1 and table.device == x.device
        scheme = "fp4" if torch.equal(table.cpu(), SCHEMES["fp4"].table()) else "nf4"
        calls.append(scheme)
        return F.linear(x, torch.ops.bitsandbytes.dequantize_4bit(codes, scales, group, scheme, shape, x.dtype))

    return SimpleNamespace(default=gemv)


@pytest.mark.parametrize("scheme", kernels.SCHEMES)
def test_releases_for_one_row_get_a_few_one_by_one(simulated, kernels_for_cuda, monkeypatch, scheme):
    calls = []
    monkeypatch.setattr(torch.ops.bitsandbytes, "gemv_4bit", one_row(calls))
    monkeypatch.setattr(bitsandbytes, "__version__", "0.49.2")
    backend, reason = backend_for(scheme, "auto", CUDA)
    assert (backend.multiply, backend.remark, reason) == (kernels.multiply_rows, "0.49.2", "")
    matrix = quantize(weights(64, 128).to(CUDA), scheme)
    for rows, products in ((1, 1), (2, 2), (kernels.SPLIT, kernels.SPLIT), (kernels.SPLIT + 1, 0)):
        calls.clear()
        x = weights(rows, 128).to(CUDA)
        y = kernels.multiply_rows(matrix, x)
        assert calls == [scheme] * products
        torch.testing.assert_close(y.cpu(), F.linear(x, matrix.dequantize()).cpu())


def test_graphs_of_a_step_hold_its_products(simulated, kernels_for_cuda):
    """Chosen by itself on a GPU; nothing in it waits or copies while it is captured, nor in torch's place."""
    model, spoken = simulated.get("english"), []
    for backend in ("auto", "torch"):
        turbo.apply(model, config("auto", backend, kernel="auto"))
        captures = simulated.machine.captures
        spoken.append(speak(model))
        assert simulated.machine.captures > captures and simulated.machine.replays > 5
        products = [name for graph in simulated.machine.graphs for name in graph.by_op if "gemm_4bit" in name]
        said = str(model.turbo.report())
        assert (f"bitsandbytes ({bitsandbytes.__version__})" in said, bool(products)) == (backend == "auto",) * 2
        turbo.revert(model)
    assert torch.equal(*spoken)


def test_releases_and_devices_with_several_rows_at_once(monkeypatch):
    assert kernels.multiply_on(CUDA) is kernels.multiply
    assert kernels.multiply_on(torch.device("xpu")) is kernels.multiply_rows


def test_missing_it_is_asked_for_by_its_command(english, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnavailablePassError, match=re.escape(f"bitsandbytes is not installed: {kernels.INSTALL}")):
        turbo.apply(english, config())
    backend, reason = backend_for("nf4", "auto", CUDA)
    assert backend.name == "torch" and not reason
    assert f"slower than bitsandbytes: bitsandbytes is not installed: {kernels.INSTALL}" in str(backend)


@pytest.mark.parametrize("number", ["0.45.5", "0.9"])
def test_too_old(monkeypatch, number):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__version__=number))
    assert f"bitsandbytes {number} is too old, 0.46 is the oldest" in kernels.why_not("nf4", CPU)


def test_an_import_that_fails_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no such library\\nand much more')")
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.syspath_prepend(tmp_path)
    assert kernels.why_not("nf4", CPU) == "bitsandbytes cannot be imported: no such library"


@pytest.mark.parametrize("device", ["cuda:0", "xpu", "mps", "meta"])
def test_no_back_end_for_the_device(device):
    reason = kernels.why_not("nf4", torch.device(device))
    assert f"has no kernels for {torch.device(device).type} on this machine: python -m bitsandbytes" in reason


@pytest.mark.parametrize("scheme, reason", [("int8", "round activations to 8 bits"), ("int4", "not int4")])
def test_schemes_that_it_does_not_compute(english, scheme, reason):
    with pytest.raises(UnavailablePassError, match=reason):
        turbo.apply(english, config(scheme))


def test_a_product_that_fails_or_is_wrong_is_a_reason(monkeypatch):
    def failing(*operands):
        raise RuntimeError("\nCUDA SETUP ERROR\nmuch more")

    def wrong(x, codes, shape, *_):
        return x.new_ones(x.size(0), shape[0])

    reasons = {failing: "cannot multiply nf4 on cpu: CUDA SETUP ERROR", wrong: "its products are wrong"}
    for product, reason in reasons.items():
        monkeypatch.setattr(torch.ops.bitsandbytes, "gemm_4bit", SimpleNamespace(default=product))
        assert kernels.why_not("nf4", CPU).endswith(reason)
