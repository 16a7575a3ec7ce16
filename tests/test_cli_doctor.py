"""``doctor``: findings, each with its remedy."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest
from cli_tools import ROOT

from chatterbox_turbo.cli import main


def test_doctor_names_the_remedy_where_pkg_resources_is_missing():
    code = "import sys; sys.modules['pkg_resources'] = None; from chatterbox_turbo.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    error = next(line for line in done.stdout.splitlines() if line.startswith("error"))
    assert "pkg_resources is missing" in error
    assert "pip install 'setuptools<81'" in done.stdout


def test_doctor_tells_what_upstream_cannot_be_imported_for(tmp_path):
    """As torchaudio does beside a torch for another CUDA: no ImportError."""
    (tmp_path / "torchaudio.py").write_text("raise RuntimeError('compiled with different CUDA versions')")
    command = [sys.executable, "-m", "chatterbox_turbo.cli", "doctor"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "compiled with different CUDA versions" in done.stdout


def test_doctor_finds_every_patch_point(prebuilt, capsys):
    assert main(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert all(check["status"] != "error" for check in checks.values())
    for name in ("model english", "model multilingual", "model turbo", "model vc"):
        assert "patch points fit" in checks[name]["detail"]
    assert {"python", "torch", "cpu", "chatterbox-tts", "watermark", "environment", "matplotlib"} <= set(checks)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("ok      python")


def test_doctor_tells_a_vendored_copy(monkeypatch, tmp_path):
    from chatterbox_turbo.cli import checks

    assert checks.distribution().status != "error"
    (tmp_path / "chatterbox").mkdir()
    (tmp_path / "chatterbox" / "__init__.py").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    check = checks.distribution()
    assert check.status == "warning" and str(tmp_path) in check.detail and check.remedy
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert checks.distribution().status == "error"


def test_doctor_tells_a_fork_by_its_code(prebuilt, monkeypatch):
    from chatterbox.models.t3 import T3

    from chatterbox_turbo.cli.checks import patch_points

    def inference(
        self, *, t3_cond, text_tokens, max_new_tokens, temperature, top_p, min_p, repetition_penalty, cfg_weight
    ):
        return None

    inference.__module__ = "chatterbox.models.t3.t3"
    monkeypatch.setattr(T3, "inference", inference)
    found = list(patch_points("english"))
    assert [check.status for check in found] == ["warning"]
    assert "t3.inference" in found[0].detail and found[0].remedy
    monkeypatch.delattr(T3, "inference_turbo")
    assert [check.status for check in patch_points("turbo")] == ["error"]


def test_doctor_names_a_wrong_environment_variable(monkeypatch):
    from chatterbox_turbo.cli.checks import configuration

    monkeypatch.setenv("CHATTERBOX_TURBO__FIDELITY", "perfect")
    check = configuration()
    assert check.status == "error" and "CHATTERBOX_TURBO__FIDELITY" in check.detail


def test_doctor_shows_what_it_finds_where_a_package_is_missing(prebuilt):
    code = "import sys; sys.modules['wrapt'] = None; from chatterbox_turbo.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok      python") and any(line.startswith("ok      torch") for line in lines)
    assert any(line.startswith("error   model english") and "wrapt" in line for line in lines), done.stdout
    assert "pip check" in done.stdout
    assert any("matplotlib" in line for line in lines)


@pytest.mark.parametrize("content", ["[flow]\nsteps = 1\nsteps = 2\n", "[flow", "self = 1\n"])
def test_doctor_names_a_file_of_the_launcher_that_is_none(monkeypatch, tmp_path, content):
    from chatterbox_turbo.cli.checks import launcher

    (tmp_path / "turbo.toml").write_text(content)
    monkeypatch.setenv("CHATTERBOX_TURBO", str(tmp_path / "turbo.toml"))
    check = launcher()
    assert check.status == "warning" and str(tmp_path / "turbo.toml") in check.detail and check.remedy
