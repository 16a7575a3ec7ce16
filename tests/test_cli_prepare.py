"""``prepare``: what it leaves behind, so that nothing is compiled or measured afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from cli_tools import ROOT, command, error

from chatterbox_turbo.cli import main
from chatterbox_turbo.runtime.t3 import step_choice
from chatterbox_turbo.upstream import t3_weights

AFTERWARDS = """
from numba.core import event

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.runtime.t3 import step_choice

model = synthetic.build("english", "tiny", 12, seed=5)

def measure(weights):
    raise AssertionError("measured again")

step_choice.measure = measure
with event.install_recorder("numba:compile") as at_apply:
    turbo.apply(model, {"preset": "auto", "decoding": {"progress": "off"}})
with event.install_recorder("numba:compile") as compiled:
    model.generate("Hello.", audio_prompt_path=str(synthetic.reference_voice()))
    reason = model.turbo.plan.step("decoding").reason
assert "numba" in reason and "ms a layer" in reason, reason
print(len(at_apply.buffer), len(compiled.buffer))
"""


@pytest.mark.exhaustive
def test_nothing_is_compiled_or_measured_afterwards(tmp_path):
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "kernels"), "CHATTERBOX_TURBO_CACHE": str(tmp_path / "steps")}
    arguments = ("prepare", "--preset", "auto", "--size", "tiny", "--device", "cpu")
    done = command(tmp_path, *arguments, **kept)
    assert done.returncode == 0, done.stderr
    compiled, found = map(int, re.search(r"kernels: (\d+) compiled, (\d+) found", done.stdout).groups())
    assert compiled > 5 and found == 0 and str(tmp_path / "kernels") in done.stdout
    steps = tmp_path / "steps" / "steps.json"
    assert f"measured: now, kept in {steps}" in done.stdout and "1 threads" in done.stdout
    measurement = steps.read_text()
    assert len(json.loads(measurement)) == 1

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **kept}

    def compiles() -> list[int]:
        code = [sys.executable, "-c", AFTERWARDS]
        later = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
        assert later.returncode == 0, later.stderr
        return [int(count) for count in later.stdout.split()[-2:]]

    # where the choice is known and kernels are not there, apply compiles them: test_step_choice.py
    assert compiles() == [0, 0] and steps.read_text() == measurement


def test_a_second_time_finds_everything(prebuilt, capsys):
    arguments = ["prepare", "--size", "tiny", "--device", "cpu"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "prepared english with preset auto on cpu" in shown
    assert "measured: nothing that was not known" in shown


def test_a_model_without_t3_has_no_step(prebuilt, capsys):
    assert main(["prepare", "--model", "vc", "--size", "tiny", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "kernels: " in shown and "step: " not in shown


@pytest.mark.parametrize("family", ["english", "turbo"])
def test_a_few_layers_have_the_shapes_of_all(family):
    """What a measurement goes by: the widths of the first layer, as upstream's configurations have them."""
    from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
    from chatterbox.models.t3.modules.t3_config import T3Config
    from chatterbox.models.t3.t3 import T3

    from chatterbox_turbo import synthetic

    with synthetic.architecture(synthetic.SHALLOW):
        hp = T3Config()
        hp.llama_config_name = "Llama_520M" if family == "english" else "GPT2_medium"
        t3 = T3(hp)
    config = LLAMA_CONFIGS[hp.llama_config_name]
    width = config.get("hidden_size") or config["n_embd"]
    inner = 2 * config["intermediate_size"] if family == "english" else config.get("n_inner") or 4 * width
    weights = t3_weights.read(t3)
    assert f"{3 * width}x{width}x{inner}x{width}x{width}," in step_choice._machine(weights)
    assert len(weights.layers) == step_choice.LAYERS


@pytest.mark.parametrize(
    ("variable", "said"), [("NUMBA_CACHE_DIR", "Compiled kernels"), ("CHATTERBOX_TURBO_CACHE", "The measurement")]
)
def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys, variable, said):
    (tmp_path / "file").write_text("in the way")
    folder = str(tmp_path / "file" / "cache")
    if variable == "NUMBA_CACHE_DIR":  # which numba reads when it is imported
        done = command(tmp_path, "prepare", "--device", "cpu", **{variable: folder})
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.setenv(variable, folder)
        code = main(["prepare", "--device", "cpu"])
        out, err = capsys.readouterr()
    assert code == 1 and not out
    line = err.splitlines()[-1]
    assert line.startswith(f"error: {said}") and f"Set {variable} to a folder" in line
    assert "building" not in err


def test_weights_that_cannot_be_fetched(no_hub, capsys):
    code, line = error(capsys, "prepare", "--download", "--device", "cpu")
    assert code == 1 and "no weights for english" in line and "Connect to the hub once" in line


def test_cached_weights_are_the_ones_that_are_prepared(no_hub, capsys, tmp_path):
    from chatterbox_turbo import synthetic

    repository = tmp_path / "cache" / "models--ResembleAI--chatterbox"
    synthetic.save(repository / "snapshots" / "0123", "english", "tiny", 12)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    with synthetic.architecture("tiny"):
        assert main(["prepare", "--download", "--device", "cpu"]) == 0
    assert "weights: real weights, from the Hugging Face cache" in capsys.readouterr().out


def test_a_budget_is_planned_for_no_model_of_few_layers(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("memory_budget: 2GB\nfidelity: lossy\n")
    code, line = error(capsys, "prepare", "--config", str(tmp_path / "c.yaml"))
    assert code == 2 and "a budget is planned by the sizes of a model" in line
