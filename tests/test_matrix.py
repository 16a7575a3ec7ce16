"""`make matrix`: its table holds what it says, it resumes, and its page tells what came of each line."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from matrix import environments, runs
from matrix.environments import AXES, Combination, NotBuilt, interpreter, read
from matrix.table import page

COMBINATIONS, REFUSED, TESTS = read()
ONE = Combination("a, b", python="3.11", chatterbox="0.1.6", transformers="newest", torch="2.6.0", numpy="<2")


def result(name: str, **told):
    made_of = {"combination": {**vars(ONE), "name": name}, "source": ""}
    plan = {"flow": {"status": "on", "reason": ""}, "precision": {"status": "skipped", "reason": "no bf16 | here"}}
    return {
        "name": name,
        "made of": made_of,
        "problem": "",
        "commit": "",
        "versions": {"chatterbox-tts": "0.1.6", "torch": "2.6.0", "python": "3.11.7", "numpy": "1.26.4"},
        "plans": {"english": plan, "turbo": "no such model"},
        "passed": 7,
        "failed": {},
        "skipped": {},
        **told,
    }


@pytest.mark.parametrize("axis", AXES)
def test_each_version_occurs_twice(axis):
    counts = Counter(getattr(combination, axis) for combination in COMBINATIONS)
    assert len(counts) >= 3 and min(counts.values()) >= 2, counts


def test_names_are_different_and_can_be_folders():
    folders = [combination.folder for combination in COMBINATIONS]
    assert len(set(folders)) == len(folders)
    assert all(re.fullmatch(r"[\w.-]+", folder) for folder in folders)


@pytest.mark.parametrize("file", TESTS)
def test_each_expression_chooses_tests_that_exist(file):
    source = (Path(__file__).parent / file).read_text()
    names = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    for part in re.split(r"\|(?![^(]*\))", TESTS[file]):
        words = re.split(r"\.\*|\(", part)[0]  # what follows is about parameters
        assert [name for name in names if re.search(words, name)], f"{file}: nothing is called {part!r}"


def test_versions_take_the_place_of_upstreams():
    upstreams = ["numpy<1.26.0,>=1.24.0", "torch==2.6.0", "transformers==4.46.3", "gradio==5.44.1", "librosa==0.11.0"]
    upstreams += ["resemble-perth @ git+somewhere", "torchaudio==2.6.0; python_version < '3.14'", "safetensors==0.5.3"]
    expected = {"torch==2.6.0", "torchaudio==2.6.0", "transformers", "numpy<2", "safetensors", "librosa==0.11.0"}
    assert set(ONE.requirements(upstreams)) == expected | {"resemble-perth==1.0.1"}
    pinned = Combination("c", python="3.11", chatterbox="0.1.7", transformers="5.2.0", torch="<3")
    expected = {"torch<3", "torchaudio", "transformers==5.2.0", "numpy<1.26.0,>=1.24.0", "safetensors==0.5.3"}
    assert set(pinned.requirements(upstreams)) == expected | {"librosa==0.11.0", "resemble-perth==1.0.1"}


def test_a_python_that_is_not_there_is_told(tmp_path):
    with pytest.raises(NotBuilt, match=r"no python3\.10 on PATH"):
        interpreter("3.10", {"PATH": str(tmp_path)})
    (tmp_path / "python3.10").symlink_to(sys.executable)
    assert interpreter("3.10", {"PATH": "", "PYTHONS": str(tmp_path)}) == str(tmp_path / "python3.10")


def test_what_cannot_be_built_is_a_result_with_the_reason_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONS", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    told = runs.run(ONE, tmp_path, uv="uv")
    assert "no python3.11" in told["problem"] and runs.failed(told)
    assert runs.kept(ONE, tmp_path) is None


def test_a_result_is_kept_as_long_as_code_and_combination_are_the_same(tmp_path, monkeypatch):
    told = {"made of": json.loads(json.dumps(runs.expectation(ONE))), "problem": ""}
    (tmp_path / f"{ONE.folder}.json").write_text(json.dumps(told))
    assert runs.kept(ONE, tmp_path) == told
    assert runs.kept(Combination(**{**vars(ONE), "torch": "2.7.0"}), tmp_path) is None
    monkeypatch.setattr(runs, "state_of_the_code", lambda: "other")
    assert runs.kept(ONE, tmp_path) is None


def test_the_code_is_all_that_results_depend_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    file = tmp_path / "chatterbox_turbo" / "passes" / "flow.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    before = runs.state_of_the_code()
    file.write_text("2")
    assert runs.state_of_the_code() != before


@pytest.mark.exhaustive
def test_only_chosen_tests_run_and_each_outcome_is_told(tmp_path, monkeypatch):
    """The whole of a run but for its environment, which is this one."""
    monkeypatch.setattr(runs, "read", lambda *_: ([], [], {"test_sampling.py": ""}))
    (tmp_path / "kernels").symlink_to(os.environ["NUMBA_CACHE_DIR"])  # this environment's are compiled
    told = runs.test(Path(sys.executable), tmp_path)
    assert told["passed"] > 20 and told["failed"] == {}, (tmp_path / "log.txt").read_text()
    assert told["versions"]["python"] == platform.python_version()
    assert told["plans"]["english"]["decoding"]["status"] == "on"

    report = tmp_path / "report.xml"
    case = '<testcase classname="tests.test_a" name="test_{}">{}</testcase>'
    bad, gone = '<failure message="assert 1 == 2"/>', '<skipped message="no Turbo"/>'
    whole = """<skipped message="collection skipped">('test_a.py', 25, 'Skipped: no Turbo')</skipped>"""
    cases = case.format("fine", "") + case.format("bad", bad) + case.format("gone", gone) + case.format("", whole)
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    failed = {"tests.test_a::test_bad": "assert 1 == 2"}
    assert runs.outcomes(report) == {"passed": 1, "failed": failed, "skipped": {"no Turbo": 2}}


def test_the_suite_runs_without_pytests_cache():
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "tests/test_patching.py"]
    done = subprocess.run(command, cwd=environments.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_that_chooses_no_test_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "read", lambda *_: ([], [], {"test_imports.py": ""}))  # which plugin.py does not know
    assert runs.test(Path(sys.executable), tmp_path)["failed"]


def test_the_page_says_what_each_line_leaves_out_and_why():
    other = {"alignment": {"status": "skipped", "reason": "no analyzer"}}
    both = result("one")["plans"]["english"]
    results = [
        result("one"),
        result("two", plans={"english": {**both, **other}}, skipped={"no Turbo": 3}),
        result("three", failed={"tests.test_a::test_bad": "why"}),
        result("four", problem="no build\nfor NumPy", versions={}, plans={}),
    ]
    text = page(results, [{"versions": "x with y", "reason": "because", "way": "z"}])
    lines = [line for line in text.splitlines() if line.startswith("| 0.1.6")]
    assert len(lines) == 4 and all(line.count(" | ") == 6 for line in lines)
    assert "no turbo" in lines[0] and "7 passed |" in lines[0]
    assert "`alignment` (english) [1]" in lines[1] and "3 skipped [2]" in lines[1]
    assert "1. no analyzer\n2. no Turbo\n" in text
    assert "**1 failed**: test_bad" in lines[2]
    assert "not run: no build for NumPy" in lines[3]
    assert "- english: `precision`: no bf16 | here" in text, "left out everywhere, said once"
    assert "| x with y | because | z |" in text


def test_the_committed_page_is_of_the_table():
    text = (environments.ROOT / "docs" / "versions.md").read_text()
    assert len([line for line in text.splitlines() if line.startswith("| ")]) >= len(COMBINATIONS) + len(REFUSED) + 2
    assert "/root/" not in text and "/tmp/" not in text and "http" not in text


def test_the_command_lists_and_runs_nothing(tmp_path):
    command = [sys.executable, "-m", "matrix", "--list", "--home", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no result of this code") == len(COMBINATIONS)
