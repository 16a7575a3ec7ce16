"""The decode step's own kernels: equal to plain torch by Triton's interpreter, compiled for GPUs that are not here."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.t3 import step_choice
from chatterbox_turbo.runtime.t3.kv_cache import KVCache
from chatterbox_turbo.runtime.t3.operations import PLAIN
from chatterbox_turbo.runtime.t3.transformer import decode_step, prefill
from chatterbox_turbo.upstream import t3_weights

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run(what: str, folder: Path, **variables: str) -> dict[str, float]:
    script, root = Path(__file__).with_name("triton_cases.py"), Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(folder), **variables}
    ran = subprocess.run([sys.executable, script, what], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@needs_triton
def test_kernels_compute_what_plain_torch_computes(tmp_path):
    """Norms, activations and attention, with and without late biases, rotary embedding, parts and watched heads."""
    errors = run("interpret", tmp_path, TRITON_INTERPRET="1")
    assert len(errors) == 9
    assert max(errors.values()) < 4, errors


@pytest.mark.exhaustive
@needs_triton
def test_kernels_compile_for_every_generation_of_gpus(tmp_path):
    sizes = run("compile", tmp_path)
    assert len(sizes) in (9 * 8, 9 * 6) and min(sizes.values()) > 1000


@pytest.fixture
def weights(models, request):
    family, dtype = request.param
    t3, journal = models(family).t3, Journal()
    if dtype != torch.float32:
        t3_weights.cast(t3, dtype, journal)
    t3_weights.fuse(t3, journal)
    yield t3_weights.read(t3)
    journal.undo()


BOTH = [(family, dtype) for family in ("multilingual", "turbo") for dtype in (torch.float32, torch.bfloat16)]


@needs_triton
@pytest.mark.parametrize("weights", BOTH, indirect=True, ids=str)
def test_a_step_of_fused_operations_is_a_step_of_plain_ones(weights):
    """Their arrangement, on the operators' implementation for CPUs."""
    from chatterbox_turbo.runtime.t3 import fused

    bound = 1e-5 if weights.dtype == torch.float32 else 3e-2
    embeds = torch.randn(3, 20, weights.width, generator=torch.Generator().manual_seed(0))
    watch, results = ((0, 1), (1, 0), (1, weights.heads - 1)), []
    with torch.inference_mode():
        for operations in (PLAIN, fused.FUSED):
            cache = KVCache(len(weights.layers), weights.heads, weights.head_width, weights.dtype, weights.device)
            cache.begin(4)
            cache.ensure(300)
            prefill(weights, cache, embeds[:, :-1], [19, 7, 1])
            logits, maps = decode_step(weights, cache, embeds[:, -1], cache.device_lengths[:3], 512, watch, operations)
            results.append((logits, maps, cache.keys.float(), cache.values.float()))
    for plain, ours in zip(*results, strict=True):
        assert (plain - ours).abs().max() < bound * plain.abs().max()
    assert torch.allclose(results[1][1].sum(-1), torch.ones(3))


def test_attention_of_few_rows_is_cut_into_parts():
    fused = pytest.importorskip("chatterbox_turbo.runtime.t3.fused")
    assert [fused.parts(16 * rows, 1280) for rows in (1, 2, 4, 8, 16)] == [8, 4, 2, 1, 1]
    assert [fused.parts(16, capacity) for capacity in (64, 256, 512)] == [1, 4, 8]


# -- where they cannot run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", BOTH[:1], indirect=True, ids=str)
def test_without_triton_the_step_is_plain_torch_and_says_so(weights, monkeypatch):
    genuine = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return genuine(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.endswith((".t3.fused", ".t3.triton_kernels"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("chatterbox_turbo.runtime.t3.fused", raising=False)
    monkeypatch.delattr("chatterbox_turbo.runtime.t3.triton_kernels", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    operations, reason = step_choice.fused_operations(weights)
    assert operations is PLAIN and "No module named 'triton'" in reason


@needs_triton
@pytest.mark.parametrize("weights", BOTH[:1], indirect=True, ids=str)
def test_kernels_that_fail_or_disagree_are_not_used(weights, monkeypatch):
    from chatterbox_turbo.runtime.t3 import fused

    assert step_choice.fused_operations(weights) == (fused.FUSED, "")
    monkeypatch.setattr(
        fused, "FUSED", step_choice.replace(fused.FUSED, activate=lambda y, gated: y.values[:, ::2] * 2)
    )
    operations, reason = step_choice.fused_operations(weights)
    assert operations is PLAIN and "their logits differ from torch's by" in reason

    def broken(*args):
        raise ValueError("ptxas fatal")

    monkeypatch.setattr(fused, "FUSED", step_choice.replace(fused.FUSED, activate=broken))
    operations, reason = step_choice.fused_operations(weights)
    assert operations is PLAIN and reason == "no fused kernels: ValueError: ptxas fatal"


@needs_triton
@pytest.mark.parametrize("weights", BOTH[:1], indirect=True, ids=str)
def test_weights_of_unusual_shape_are_left_to_plain_torch(weights):
    from chatterbox_turbo.runtime.t3 import fused

    assert fused.unsuitable(weights) == ""
    assert "not a power of two" in fused.unsuitable(step_choice.replace(weights, heads=10))
    head = step_choice.replace(weights.head, weight=weights.head.weight.half())
    assert "several formats" in fused.unsuitable(step_choice.replace(weights, head=head))
