"""``voices``: a folder of named voices from the command line, and ``say`` with one of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cli_tools import ROOT, command, error, watermark_in

import chatterbox_turbo as turbo
from chatterbox_turbo.cli import main
from chatterbox_turbo.synthetic import reference_voice
from chatterbox_turbo.upstream import voice_files

WHOLE = str(reference_voice())  # 11 s, of which ten are used


@pytest.fixture
def folder(capsys, prebuilt, tmp_path):
    """A folder with the voice anna, of English; what was said of it is in ``capsys``."""
    folder = tmp_path / "voices"
    assert main(["voices", "add", "anna", WHOLE, "--folder", str(folder), "--synthetic"]) == 0
    return folder


def test_a_voice_is_made_listed_copied_and_removed(folder, capsys, tmp_path):
    said = capsys.readouterr().out
    assert "anna.safetensors: a voice of english, 160 KiB, made of a recording (SHA-256 " in said
    at = ["--folder", str(folder)]
    assert main(["voices", "list", *at]) == 0
    shown = capsys.readouterr().out
    assert "anna" in shown and "english" in shown and "10.0 s" in shown
    assert main(["voices", "show", "anna", *at]) == 0
    shown = capsys.readouterr().out
    assert "family: english" in shown and "prompt tokens: 25" in shown and "sample rate: 24000" in shown
    assert main(["voices", "show", "anna", *at, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["name"] == "anna" and len(about["source"]["sha256"]) == 64
    assert main(["voices", "export", "anna", str(tmp_path / "a.safetensors"), *at]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (folder / "anna.safetensors").read_bytes()
    assert main(["voices", "import", str(tmp_path / "a.safetensors"), "--name", "ben", *at]) == 0
    assert main(["voices", "export", "ben", str(tmp_path), *at]) == 0 and (tmp_path / "ben.safetensors").exists()
    capsys.readouterr()
    assert main(["voices", "list", *at, "--json"]) == 0
    assert [*json.loads(capsys.readouterr().out)["voices"]] == ["anna", "ben"]
    assert main(["voices", "remove", "ben", *at]) == 0
    assert [path.name for path in folder.iterdir()] == ["anna.safetensors"]


def test_say_speaks_with_a_named_voice(folder, tmp_path, voice):
    def said(name, *arguments):
        out = tmp_path / name
        assert main(["say", "Hello.", "-o", str(out), "--synthetic", "--seed", "3", *arguments]) == 0
        return out.read_bytes()

    named = said("named.wav", "--voice", "anna", "--voice-folder", str(folder))
    assert named == said("recording.wav", "--voice", WHOLE) != said("shorter.wav", "--voice", voice)
    assert watermark_in(tmp_path / "named.wav") > 0


def test_what_upstream_saves_is_imported(models, capsys, tmp_path):
    models("turbo").conds.save(tmp_path / "conds.pt")
    arguments = ["voices", "import", str(tmp_path / "conds.pt"), "--folder", str(tmp_path / "new")]
    code, line = error(capsys, *arguments)
    assert code == 1 and "does not say of which model it is" in line and "Name the model" in line
    assert main([*arguments, "--name", "t", "--model", "turbo"]) == 0
    assert voice_files.read(tmp_path / "new" / "t.safetensors").family == "turbo"


def test_a_file_that_is_none_is_named_in_the_list(folder, capsys):
    (folder / "broken.safetensors").write_text("nothing")
    capsys.readouterr()
    assert main(["voices", "list", "--folder", str(folder)]) == 1
    shown = capsys.readouterr()
    assert "anna" in shown.out and "broken.safetensors' is no voice" in shown.err
    code, line = error(capsys, "voices", "remove", "broken", "--folder", str(folder))
    assert code == 1 and "is no voice" in line and (folder / "broken.safetensors").exists()
    (folder / "broken.safetensors").unlink()
    (folder / "anna.safetensors").unlink()
    assert main(["voices", "list", "--folder", str(folder)]) == 0
    assert "has no voices" in capsys.readouterr().err


def test_a_damaged_voice_is_replaced(folder, models):
    turbo.revert(models("english"))  # a kept model, where a command loads its own
    before = (folder / "anna.safetensors").read_bytes()
    (folder / "anna.safetensors").write_text("nothing")
    assert main(["voices", "add", "anna", WHOLE, "--folder", str(folder), "--synthetic", "--replace"]) == 0
    assert [path.name for path in folder.iterdir()] == ["anna.safetensors"]
    assert (folder / "anna.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        (("voices", "show", "ana", "--folder", "{voices}"), 1, ["no voice 'ana'", "did you mean 'anna'"]),
        (("voices", "remove", "ana", "--folder", "{voices}"), 1, ["no voice 'ana'"]),
        (("voices", "export", "ana", "x", "--folder", "{voices}"), 1, ["no voice 'ana'"]),
        (("voices", "list", "--folder", "{voices}/none"), 1, ["cannot be read"]),
        (("voices", "list"), 2, ["--folder"]),
        (("voices", "add", "a/b", "{wav}", "--folder", "{voices}"), 2, ["cannot be named 'a/b'"]),
        (("voices", "add", "anna", "{wav}", "--folder", "{voices}"), 2, ["'anna'", "already", "--replace"]),
        (("voices", "add", "Anna", "{wav}", "--folder", "{voices}", "--replace"), 2, ["'anna'", "already"]),
        (("voices", "add", "x", "none.wav", "--folder", "{voices}"), 2, ["none.wav", "does not exist"]),
        (("voices", "export", "anna", "{wav}", "--folder", "{voices}"), 2, ["is there already", "--replace"]),
        (("voices", "import", "{wav}", "--folder", "{voices}"), 1, ["is no voice", "voices add"]),
        (("voices", "import", "{wav}", "--folder", "{voices}", "--name", "CON"), 2, ["cannot be named 'CON'"]),
        (("voices", "import", "{voices}/anna.safetensors", "--folder", "{voices}", "--name", "Anna"), 2, ["'anna'"]),
        (("say", "hi", "--voice", "anna"), 2, ["'anna' does not exist", "--voice-folder"]),
        (("say", "hi", "--voice-folder", "{voices}"), 2, ["needs --voice NAME"]),
        (("say", "hi", "--voice", "ana", "--voice-folder", "{voices}"), 1, ["no voice 'ana'", "did you mean 'anna'"]),
    ],
)
def test_misuse_is_one_line(folder, capsys, tmp_path, voice, arguments, code, fragments):
    capsys.readouterr()
    found, line = error(capsys, *(one.format(voices=folder, wav=voice) for one in arguments))
    assert found == code, line
    for fragment in fragments:
        assert fragment in line
    assert [path.name for path in folder.iterdir()] == ["anna.safetensors"]


def test_only_add_needs_a_model(folder):
    code = (
        "import sys; from chatterbox_turbo.cli import main; "
        f"assert main(['voices', 'list', '--folder', {str(folder)!r}]) == 0; "
        f"assert main(['voices', 'show', 'anna', '--folder', {str(folder)!r}]) == 0; "
        "sys.exit('chatterbox' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_the_help_of_voices(tmp_path):
    done = command(tmp_path, "voices", "--help")
    assert done.returncode == 0 and all(name in done.stdout for name in ("add", "list", "show", "export", "import"))
