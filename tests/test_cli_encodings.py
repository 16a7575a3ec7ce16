"""Characters that the encoding of the console or pipe lacks, as cp1252 does on Windows, end no command."""

from __future__ import annotations

import json

import pytest
from cli_tools import command

OWN = "ż.toml"  # in neither of the encodings
ESCAPED = r"\u017c"


@pytest.fixture(params=["ascii", "cp1252"])
def run(request, tmp_path):
    (tmp_path / OWN).write_text('preset = "fast"\n', encoding="utf-8")

    def run(*arguments: str, **environment: str) -> str:
        done = command(tmp_path, *arguments, encoding=request.param, **environment)
        assert done.returncode == 0 and "error" not in done.stderr, done.stderr
        return done.stdout

    return run


def test_presets_in_a_table(run):
    assert "vram_2gb" in run("presets")
    assert f"{ESCAPED}.toml" in run("presets", OWN)


def test_json_is_json(run):
    assert json.loads(run("presets", OWN, "--json"))["presets"][OWN]["config"]["preset"] == "fast"


def test_doctor(run):
    findings = run("doctor", CHATTERBOX_TURBO=OWN)
    assert "patch points fit" in findings and f"{ESCAPED}.toml, and nothing looks for it" in findings


def test_inspect(run):
    assert "preset fast" in run("inspect", "--config", OWN)


def test_say_in_a_file_of_such_a_name(run, tmp_path):
    assert f"{ESCAPED}.wav" in run("say", "Zażółć?", "--synthetic", "--size", "tiny", "-o", "ż.wav")
    assert (tmp_path / "ż.wav").stat().st_size > 1000


def test_what_is_wrong_is_one_line(tmp_path):
    done = command(tmp_path, "presets", "autoż", encoding="ascii")
    assert done.returncode == 2 and f"'auto{ESCAPED}'" in done.stderr.splitlines()[-1]
