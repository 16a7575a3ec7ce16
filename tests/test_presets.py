"""Presets by machine: what they set, which one is recommended where, and how the command shows it."""

from __future__ import annotations

import json

import pytest
import torch

from chatterbox_turbo.budget import machine
from chatterbox_turbo.budget.machine import Machine
from chatterbox_turbo.cli import checks, main
from chatterbox_turbo.config import DESCRIPTIONS, PRECISION_PARTS, PRESETS, OptimizationConfig, exceeds
from chatterbox_turbo.runtime.device import devices

GB = 10**9


def a_machine(kind, gigabytes, half="bfloat16"):
    return Machine(kind, kind, gigabytes * GB, gigabytes * GB // 2, 8, half, "a reason")


@pytest.mark.parametrize(
    "kind, gigabytes, half, preset",
    [
        ("cuda", 2, "float16", "vram_2gb"),
        ("cuda", 4, "float16", "vram_4gb"),
        ("cuda", 6, "bfloat16", "vram_6gb"),
        ("cuda", 8, "bfloat16", "vram_8gb"),
        ("cuda", 12, "bfloat16", "vram_12gb"),
        ("cuda", 16, "bfloat16", "vram_12gb"),
        ("cuda", 24, "bfloat16", "vram_24gb"),
        ("cuda", 141, "bfloat16", "vram_24gb"),
        ("cuda", 4, "", "low_vram"),
        ("cuda", 2, "", "vram_2gb"),
        ("cuda", 11, "", "auto"),
        ("mps", 16, "", "mps"),
        ("cpu", 8, "bfloat16", "cpu_small"),
        ("cpu", 8, "", "cpu_small"),
        ("cpu", 64, "bfloat16", "fast"),
        ("cpu", 64, "", "auto"),
        ("cpu", 0, "", "auto"),
    ],
)
def test_the_preset_for_a_machine(kind, gigabytes, half, preset):
    name, reason = a_machine(kind, gigabytes, half).preset()
    assert name == preset in PRESETS and reason


def test_cards_are_in_order_and_presets():
    for cards in (machine.CARDS, machine.OLD_CARDS):
        assert [most for most, _ in cards] == sorted(most for most, _ in cards)
        assert {name for _, name in cards} <= PRESETS.keys()
    assert machine.LARGEST in PRESETS


def test_each_preset_sets_what_its_fidelity_allows_and_is_another_one():
    configs = {name: OptimizationConfig.from_preset(name) for name in PRESETS}
    for name, config in configs.items():
        assert DESCRIPTIONS[name].endswith(".") and len(DESCRIPTIONS[name]) < 110
        for section in PRESETS[name].keys() - {"fidelity"}:
            assert not exceeds(getattr(config, section).promise, config.fidelity), (name, section)
        assert config.budget is None, "it is to run on every device"
        others = [other for other, one in configs.items() if other != name]
        assert all(configs[other].model_dump() != config.model_dump() | {"preset": other} for other in others), name
    assert configs["auto"].fidelity == configs["mps"].fidelity == "numerical"


def test_this_machine():
    here = Machine.of(torch.device("cpu"))
    assert 0 < here.free <= here.total and here.cores >= 1
    assert f"{here.cores} cores" in str(here) and "free" in str(here)


def test_the_presets_command_looks_at_apples_gpu_as_doctor_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.best_device() == "mps"
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device: a_machine(device.type, 16, "")))
    assert "recommended on mps: mps" in list(checks.devices())[-1].detail


def test_presets_are_shown_with_what_they_set(capsys, monkeypatch):
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device: a_machine("cuda", 4)))
    assert main(["presets"]) == 0
    shown = capsys.readouterr().out
    assert "* vram_4gb " in shown and shown.count("*") == 2
    assert "recommended on this machine: vram_4gb (a GPU with 4.00 GB of memory)" in shown
    assert "precision: t3 auto, flow auto, encoder auto, vocoder auto; flow: batch_frames 2500" in shown
    assert main(["presets", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["default"] == "auto" and data["recommended"]["preset"] == "vram_4gb"
    assert data["presets"]["exact"]["config"]["fidelity"] == "exact"
    assert data["presets"]["fast"]["sets"]["precision"] == dict.fromkeys(PRECISION_PARTS, "auto")


def test_every_option_of_some(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text('fidelity = "exact"\n')
    assert main(["presets", str(tmp_path / "mine.toml"), "--json"]) == 0
    (mine,) = json.loads(capsys.readouterr().out)["presets"].values()
    assert mine["sets"] == {"fidelity": "exact"} and mine["config"]["fidelity"] == "exact"
    assert main(["presets", "vram_2gb", "mps"]) == 0
    shown = capsys.readouterr().out
    assert "vram_2gb" in shown and "max_new_tokens" in shown and "balanced" in shown and "cpu_small" not in shown
    assert main(["presets", "cpu_smal"]) == 2
    assert "did you mean 'cpu_small'" in capsys.readouterr().err


def test_inspect_leaves_a_budget_out(prebuilt, capsys, tmp_path):
    (tmp_path / "turbo.toml").write_text('memory_budget = "2GB"\n')
    assert main(["inspect", "english", "--config", str(tmp_path / "turbo.toml")]) == 0
    shown = capsys.readouterr()
    assert "The budget is left out" in shown.err and "memory_budget" not in shown.out
    assert main(["inspect", "english"]) == 0
    assert "by the machine" not in capsys.readouterr().out


def test_doctor_names_it():
    check = checks.preset(torch.device("cpu"))
    name, reason = Machine.of(torch.device("cpu")).preset()
    assert check.status == "ok" and check.detail == f"recommended on cpu: {name} ({reason})"
