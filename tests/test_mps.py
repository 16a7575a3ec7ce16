"""Apple's GPUs, as far as a machine without one can tell: what each pass says there, and what must never reach one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo.budget.machine import Machine
from chatterbox_turbo.config import PRESETS
from chatterbox_turbo.passes import ALL_PASSES
from chatterbox_turbo.runtime import quantization
from chatterbox_turbo.runtime.device import devices, random_state
from chatterbox_turbo.runtime.device.timing import PhaseTimer
from chatterbox_turbo.runtime.voice import reference_audio
from chatterbox_turbo.upstream import families

MPS = torch.device("mps")
RUNTIME = Path(turbo.__file__).parent / "runtime"
# What this says of a pass where everything of it is asked for: "" runs, else part of the reason.
ASKED = {
    "memory": ({"profile": "balanced"}, ""),
    "memory, max_split_mb": ({"enabled": True, "max_split_mb": 64}, "is of PyTorch's CUDA allocator"),
    "decoding": ({}, ""),
    "alignment": ({}, "it does not apply to"),
    "text": ({}, ""),
    "quantization": ({"t3": "nf4", "strategy": "aggressive"}, ""),
    "quantization, native": ({"t3": "int8", "backend": "native"}, "kernels run on CPUs, and the model is on mps"),
    "quantization, int8": ({"t3": "int8", "strategy": "aggressive"}, "which MPS has from macOS 14 on"),
    "precision": ({"t3": "auto"}, "half precision has not been tried on mps"),
    "precision, flow": ({"flow": "float16"}, "half precision has not been tried on mps"),
    "precision, tf32": ({"tf32": True}, "TF32 needs a CUDA device, the model is on mps"),
    "attention": ({"prefill": "flash_attention_2"}, "flash"),
    "flow": ({}, ""),
    "vocoder": ({}, ""),
    "conditioning": ({}, ""),
    "conditioning, onednn": ({"matmul": "onednn"}, "which computes on CPUs, and the model is on mps"),
    "watermark": ({"device": "model"}, ""),
    "offload": ({"mode": "idle"}, "the memory of mps is the host's"),
    "warmup": ({"level": "light"}, ""),
}  # fmt: skip


@pytest.fixture
def on_mps(models, monkeypatch):
    """A tiny model that says that it is on MPS; only plans are made of it."""
    monkeypatch.setattr(families, "device_of", lambda model: MPS)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**30)
    return models("english")


def test_every_pass_is_asked():
    assert {name.partition(",")[0] for name in ASKED} == {p.name for p in ALL_PASSES}


@pytest.mark.parametrize("asked", ASKED)
def test_each_pass_runs_or_says_why_not(on_mps, asked):
    name, (options, reason) = asked.partition(",")[0], ASKED[asked]
    if options.get("enabled") is True:
        with pytest.raises(turbo.TurboError, match=re.escape(reason)):
            turbo.inspect(on_mps, {"fidelity": "lossy", name: options})
        return
    step = turbo.inspect(on_mps, {"fidelity": "lossy", name: options}).step(name)
    assert step.status == ("skipped" if reason else "on"), step
    assert reason in step.reason


def test_presets_there(on_mps):
    for name in PRESETS:
        plan = turbo.inspect(on_mps, name)
        flow = set() if plan.config.fidelity == "exact" else {"flow"}
        assert flow | {"decoding", "vocoder", "conditioning", "watermark"} <= set(plan.running)
        assert not {"offload", "precision"} & set(plan.running)
    assert turbo.inspect(on_mps, "mps").step("memory").status == "on"
    machine = Machine.of(MPS)
    assert (machine.total, machine.free) == (16 * 2**30, 15 * 2**30) and machine.preset()[0] == "mps"


def test_a_budget_there(on_mps):
    plan = turbo.inspect(on_mps, {"vram_budget": "50%"})
    assert plan.fit.size == 8 * 2**30 and plan.fit.chosen == "as configured"
    with pytest.raises(turbo.errors.BudgetError, match=r"the model is on mps.*Set vram_budget instead"):
        turbo.inspect(on_mps, {"memory_budget": "2GB"})


def test_nothing_of_the_hot_path_makes_float64_on_a_device():
    """MPS has none; the host's may be that wide."""
    allowed = {
        ("t3/alignment.py", "precision = torch.float32 if device.type == \"mps\" else torch.float64"),
        ("device/quantized.py", ").double()"),  # tables, on the host
        ("device/quantized.py", "torch.zeros(1, dtype=torch.float64, device=\"cpu\")"),
        ("voice/blending.py", "stacked"),  # of voices on the host
        ("s3gen/streamed_vocoder.py", 'torch.float32 if device.type == "mps" else torch.float64'),
        ("loading/tensor_file.py", 'torch.float64: "F64"'),  # formats of files
    }  # fmt: skip
    found = []
    for path in RUNTIME.rglob("*.py"):
        if path.parent.name == "cpu":
            continue
        for line in path.read_text().splitlines():
            code = line.partition("#")[0]
            if re.search(r"torch\.float64|torch\.double|\.double\(", code):
                place = path.relative_to(RUNTIME).as_posix()
                if not any(place == where and part in code for where, part in allowed):
                    found.append((place, code.strip()))
    assert found == []


def test_a_reference_recording_reaches_it_as_float32(monkeypatch):
    torchaudio, seen = pytest.importorskip("torchaudio"), []

    class Waves(torch.Tensor):
        def to(self, device):
            seen.append((str(device), self.dtype))
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(reference_audio.torch, "from_numpy", lambda array: torch.tensor(array).as_subclass(Waves))
    monkeypatch.setattr(torchaudio.functional, "resample", lambda waves, source, target: waves)
    reference_audio.resample_on(MPS)(np.zeros(8), 24000, 16000)
    assert seen == [("mps", torch.float32)]


def test_what_arrives_is_on_the_host():
    assert devices.arriving(torch.zeros(3))().device.type == "cpu"

    class Elsewhere:
        device = MPS

        def cpu(self):
            return "on the host"

    assert devices.arriving(Elsewhere())() == "on the host"


def test_its_generator_and_its_queue(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "state")
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: calls.append(("set", state)))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda number: calls.append(("seed", number)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("waited"))
    with random_state.kept(MPS):
        random_state.seed(MPS, 7)
    assert calls == [("seed", 7), ("set", "state")]
    with PhaseTimer(MPS).phase("t3"):
        pass
    assert calls[2:] == ["waited", "waited"]


def test_bf16_scales_need_a_newer_system(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
    assert quantization.backend_for("int8", "auto", MPS)[1] == ""
