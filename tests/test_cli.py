"""The command as such: help, misuse, what goes to which stream; presets and inspect."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings

import pytest
from cli_tools import ROOT, error

from chatterbox_turbo.cli import main
from chatterbox_turbo.cli.screen import Screen
from chatterbox_turbo.errors import SpeechTruncatedWarning


def test_help_imports_neither_torch_nor_upstream():
    code = (
        "import sys; from chatterbox_turbo.cli import main; assert main(['--help']) == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'chatterbox', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_inspect_shows_the_plan(prebuilt, capsys):
    assert main(["inspect", "english", "--preset", "exact"]) == 0
    shown = capsys.readouterr().out
    assert "preset exact" in shown and "+ decoding" in shown
    assert "skipped: it does not apply to ChatterboxTTS" in shown


def test_inspect_as_json(prebuilt, capsys):
    assert main(["inspect", "vc", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["family"] == "vc" and {step["name"]: step["status"] for step in data["passes"]}["watermark"] == "on"


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("say", ""), ["text is empty", "standard input"]),
        (("say", "hi", "--model", "klingon"), ["klingon", "english"]),
        (("say", "hi", "--model", "vc"), ["vc converts speech"]),
        (("say", "hi", "--preset", "fats"), ["Unknown preset 'fats'", "Presets are: exact, auto"]),
        (("say", "hi", "--config", "{folder}/bad.toml"), ["bad.toml", "decoding.max_new_tokens", "'many'"]),
        (("say", "hi", "--config", "{folder}/typo.toml"), ["typo.toml", "decodign", "did you mean 'decoding'"]),
        (("say", "hi", "--config", "{folder}/none.toml"), ["none.toml", "does not exist"]),
        (("say", "hi", "--preset", "auto", "--config", "{folder}/bad.toml"), ["either --preset or --config"]),
        (("say", "hi", "--voice", "{folder}/none.wav"), ["none.wav", "does not exist"]),
        (("say", "hi", "-o", "{folder}/none/out.wav"), ["cannot write", "none/out.wav", "No such file"]),
        (("say", "hi", "-o", "{folder}/out.xyz"), ["unknown audio format '.xyz'"]),
        (("say", "hi", "--device", "cuda:99"), ["no device cuda:99"]),
        (("say", "hi", "--device", "abacus"), ["unknown device 'abacus'"]),
        (("say", "hi", "--language", "fr"), ["--language fr", "multilingual"]),
        (("say", "hi", "--model", "multilingual", "--language", "xx"), ["unknown language 'xx'", "fr"]),
        (("say", "hi", "--synthetic", "--checkpoint", "{folder}"), ["either --synthetic or --checkpoint"]),
        (("demo", "--text", " "), ["text is empty"]),
        (("demo", "--out", "{folder}/bad.toml"), ["bad.toml", "is a file"]),
        (("demo", "--model", "vc", "--stop-after", "9", "--out", "{folder}"), ["--stop-after"]),
        (("bench", "--json", "{folder}/none/b.json"), ["cannot write"]),
        (("bench", "--runs", "0"), ["--runs"]),
        (("verify", "--texts", "99"), ["--texts"]),
        (("prepare", "--checkpoint", "{folder}", "--download"), ["either --checkpoint or --download"]),
        (("dmeo",), ["dmeo"]),
        (("say", "hi", "--loud"), ["--loud"]),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, fragments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text('[decoding]\nmax_new_tokens = "many"\n')
    (tmp_path / "typo.toml").write_text("[decodign]\nenabled = true\n")
    code, line = error(capsys, *(argument.format(folder=tmp_path) for argument in arguments))
    assert code == 2
    for fragment in fragments:
        assert fragment in line


def test_the_command_without_arguments_shows_its_help(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("chatterbox-turbo ")


def test_names_of_models_and_sizes_are_the_packages():
    from chatterbox_turbo import synthetic
    from chatterbox_turbo.cli.options import ModelName, SizeName
    from chatterbox_turbo.upstream.families import FAMILIES

    assert tuple(name.value for name in ModelName) == FAMILIES
    assert tuple(name.value for name in SizeName) == synthetic.SIZES


def test_quiet_lets_only_our_warnings_through(capsys):
    screen = Screen([])
    with screen.quiet():
        print("upstream prints")
        print("upstream draws a bar", file=sys.stderr)
        warnings.warn("upstream is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("cut", SpeechTruncatedWarning, stacklevel=1)
        logging.getLogger("upstream").error("upstream logs")
        screen.print("a result")
    assert logging.root.manager.disable == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a result\n", "warning: cut\n")
