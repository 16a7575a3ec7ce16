"""``quantize``: the folder that it writes, that other commands take it, and what it says of bad input."""

from __future__ import annotations

import io
from typing import get_args

import pytest
from cli_tools import command, error, watermark_in
from loading_tools import in_cache
from rich.console import Console

from chatterbox_turbo.cli import main
from chatterbox_turbo.cli.quantize import RoundingName, SchemeName, StrategyName, _bar
from chatterbox_turbo.cli.screen import Screen
from chatterbox_turbo.config.sections import QuantizationSection
from chatterbox_turbo.passes.quantization import STRATEGIES
from chatterbox_turbo.runtime.device.quantized import SCHEMES

SMALL = ("--size", "tiny", "--strategy", "aggressive")


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    """A folder that the command has written."""
    folder = tmp_path_factory.mktemp("cli")
    done = command(folder, "quantize", str(saved("english")), "small", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "small: english with T3 in int8 (aggressive), 27 MB; 80 MB in all" in done.stdout
    assert 'turbo.load("english", folder="small")' in done.stdout
    assert "writing t3.int8.safetensors" in done.stderr
    for noise in ("Warning", "PerthNet"):
        assert noise not in done.stdout + done.stderr
    return folder / "small"


@pytest.mark.exhaustive
def test_say_takes_the_folder(quantized, tmp_path):
    out = tmp_path / "hello.wav"
    assert main(["say", "Hello.", "-o", str(out), "--checkpoint", str(quantized), "--size", "tiny"]) == 0
    assert watermark_in(out) == pytest.approx(16 / 25)


def test_another_models_command_does_not(quantized, capsys, tmp_path):
    code, line = error(
        capsys, "say", "hi", "-o", str(tmp_path / "a.wav"), "--model", "turbo", "--checkpoint", str(quantized)
    )
    assert code == 1 and "holds a quantized ChatterboxTTS (English)" in line and "--model english" in line


def test_it_refuses_to_overwrite_and_to_quantize_twice(quantized, saved, capsys, tmp_path):
    code, line = error(capsys, "quantize", str(saved("english")), str(quantized))
    assert code == 1 and "exists already. Nothing is overwritten. Name a folder that does not." in line
    code, line = error(capsys, "quantize", str(quantized), str(tmp_path / "new"))
    assert code == 1 and "is quantized already (int8)" in line
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(saved, tmp_path, monkeypatch):
    from chatterbox_turbo.upstream import quantized_writer

    def interrupted(*_):
        assert [path.name[:5] for path in tmp_path.iterdir()] == [".new."]
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized_writer, "quantize", interrupted)
    assert main(["quantize", str(saved("english")), str(tmp_path / "new"), *SMALL]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_models_name_means_its_weights_on_the_hub(saved, tmp_path, monkeypatch):
    in_cache(monkeypatch, tmp_path / "hub", saved("english"), "ResembleAI/chatterbox")
    assert main(["quantize", "english", str(tmp_path / "new"), *SMALL]) == 0
    assert (tmp_path / "new" / "t3.int8.safetensors").exists()


def test_no_weights_and_no_hub(no_hub, capsys, tmp_path):
    code, line = error(capsys, "quantize", "english", str(tmp_path / "new"))
    assert code == 1 and "There are no weights for english: none are cached" in line


@pytest.mark.parametrize(
    "source, options, code, message",
    [
        ("nowhere", (), 1, r"SRC is 'nowhere': neither a folder nor a model that speaks"),
        ("empty", (), 1, "is no checkpoint of a model that speaks. It has none of t3_cfg.safetensors"),
        ("both", (), 1, "holds several models: english, turbo. Say which with --model."),
        ("english", ("--model", "turbo"), 2, "SRC is english, and --model turbo."),
        ("vc", (), 1, "SRC is 'vc': neither a folder nor a model that speaks"),
        ("english", ("--scheme", "int2"), 2, "'int2' is not one of"),
    ],
)
def test_bad_input_is_explained(capsys, tmp_path, monkeypatch, source, options, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "both").mkdir()
    for name in ("t3_cfg.safetensors", "t3_turbo_v1.safetensors"):
        (tmp_path / "both" / name).touch()
    given, line = error(capsys, "quantize", source, "new", *options)
    assert given == code and message in line
    assert not (tmp_path / "new").exists()


def test_choices_are_those_of_the_configuration():
    fields = QuantizationSection.model_fields
    assert (
        {choice.value for choice in SchemeName}
        == set(SCHEMES)
        == set(get_args(fields["t3"].annotation))
        - {
            "none",
            "auto",
        }
    )
    assert {choice.value for choice in StrategyName} == set(STRATEGIES)
    assert {choice.value for choice in RoundingName} == set(get_args(fields["rounding"].annotation))


def test_a_terminal_gets_a_bar():
    screen = Screen([])
    screen.err = Console(file=io.StringIO(), force_terminal=True, width=100)
    with _bar(screen) as progress:
        progress("t3.int8.safetensors", 10**6, 4 * 10**6)
    assert "t3.int8.safetensors" in screen.err.file.getvalue() and "1.0/4.0 MB" in screen.err.file.getvalue()
