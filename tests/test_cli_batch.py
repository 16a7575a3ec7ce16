"""``batch``: files and results, lines that are wrong or fail, resuming, an interrupt."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest
import soundfile
from cli_tools import error, started, watermark_in

import chatterbox_turbo as turbo
from chatterbox_turbo.cli import main
from chatterbox_turbo.cli.prompts import digest_of, read_prompts
from chatterbox_turbo.errors import InvalidRequestError, TurboError
from chatterbox_turbo.speech.lines import results_of
from chatterbox_turbo.synthetic import reference_voice

TOML = 'decoding = {kernel = "torch"}\n'
LINES = [
    {"text": "One fox."},
    {"text": "Two foxes jump over a dog.", "id": "two", "seed": 7, "temperature": 0.6},
    {"text": "Three."},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with lines and a configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(TOML)
    write(tmp_path, LINES)
    return tmp_path


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no disk that is always full")
def test_a_record_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "results.jsonl").symlink_to("/dev/full")
    with pytest.raises(TurboError, match=r"results\.jsonl cannot be written: No space left") as caught:  # noqa: SIM117
        with results_of(tmp_path) as add:
            add({"file": "1.wav"})
    assert "kept" in str(caught.value)


def write(folder, lines):
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


ARGUMENTS = ("batch", "p.jsonl", "-o", "out", "--synthetic", "--config", "c.toml")


def results(folder):
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def samples(folder, name):
    return soundfile.read(folder / "out" / name, dtype="float32")[0]


def test_a_file_a_line(prebuilt, no_hub, folder, capsys):
    assert main([*ARGUMENTS, "--seed", "40", "--slots", "2"]) == 0
    shown = capsys.readouterr()
    assert "out: 3 of 3 lines" in shown.out and "x real time), 0 failed" in shown.out
    assert "speaking: 3 of 3 lines" in shown.err and "Warning" not in shown.err
    found = {one["id"]: one for one in results(folder)}
    assert {name: (one["line"], one["seed"], one["error"]) for name, one in found.items()} == {
        "1": (1, 41, None),
        "two": (2, 7, None),
        "3": (3, 43, None),
    }
    for one in found.values():
        assert watermark_in(folder / "out" / one["file"]) == pytest.approx(one["seconds"])
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["1.wav", "3.wav", "results.jsonl", "two.wav"]
    code, line = error(capsys, *(one for one in ARGUMENTS if one != "--synthetic"))
    assert code == 1 and "weights" in line, "what a trial has spoken is not finished"


def test_a_line_is_what_it_is_alone_and_again(prebuilt, folder, capsys):
    assert main([*ARGUMENTS]) == 0
    first, count = {name: samples(folder, name) for name in ("1.wav", "two.wav", "3.wav")}, len(results(folder))
    capsys.readouterr()
    assert main([*ARGUMENTS]) == 0  # nothing to do
    assert "all 3 lines are finished" in capsys.readouterr().out and len(results(folder)) == count
    (folder / "out" / "3.wav").unlink()  # a file is gone, a line has changed, one was being written
    write(folder, [{"text": "Another one."}, *LINES[1:]])
    with (folder / "out" / "results.jsonl").open("a") as file:
        file.write('{"id": "two", "li')
    assert main([*ARGUMENTS]) == 0
    shown = capsys.readouterr()
    assert "1 of 3 lines are finished already" in shown.err and "out: 2 of 2 lines" in shown.out
    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines[-2:]] in (["1", "3"], ["3", "1"])
    for name, same in (("1.wav", False), ("two.wav", True), ("3.wav", True)):
        now = samples(folder, name)
        assert bool(now.shape == first[name].shape and np.abs(now - first[name]).max() < 1e-3) is same, name
    assert main([*ARGUMENTS, "--seed", "5"]) == 0  # those without a seed of their own
    assert "out: 2 of 2 lines" in capsys.readouterr().out


def test_one_failure_harms_no_other_and_is_tried_again(prebuilt, folder, capsys):
    write(folder, [LINES[0], {"text": "Two.", "temperature": -1.0}, {"text": "Three.", "voice": "bad.wav"}, LINES[2]])
    (folder / "bad.wav").write_text("not audio")
    assert main([*ARGUMENTS, "--format", "flac"]) == 1
    shown = capsys.readouterr()
    assert "out: 2 of 4 lines" in shown.out and "2 failed" in shown.out
    assert (
        "line 2 (2): InvalidRequestError: temperature" in shown.err and "line 3 (3): ReferenceAudioError" in shown.err
    )
    found = {one["id"]: one for one in results(folder)}
    assert found["2"]["error"].startswith("InvalidRequestError") and found["2"]["seconds"] is None
    for name in ("1", "4"):
        assert watermark_in(folder / "out" / f"{name}.flac") == pytest.approx(found[name]["seconds"])
    assert not (folder / "out" / "2.flac").exists()
    write(folder, [LINES[0], LINES[2], LINES[2], LINES[2]])
    assert main([*ARGUMENTS, "--format", "flac"]) == 0
    assert "out: 2 of 2 lines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "a"', "no JSON: Expecting"),
        ('["a"]', "['a'] is no object"),
        ('{"text": "a", "temprature": 1}', "unknown key 'temprature' (did you mean 'temperature'?)"),
        ('{"id": "x"}', "there is no text"),
        ('{"text": " "}', "the text is ' '"),
        ('{"text": 3}', "the text is 3"),
        ('{"text": "a", "text": "b"}', "'text' is there twice"),
        ('{"text": "a", "temperature": NaN}', "NaN is no number in JSON"),
        ('{"text": "a", "seed": -1}', "the seed is -1"),
        ('{"text": "a", "seed": "1"}', "the seed is '1'"),
        ('{"text": "a", "id": "../b"}', "the id '../b' is no name of a file"),
        ('{"text": "a", "id": ".b"}', "the id '.b' is no name of a file"),
        ('{"text": "a", "id": ""}', "the id is ''"),
        ('{"text": "a", "id": "x\\ud800"}', "has half of a character"),
        ('{"text": "a", "id": "nul"}', "that Windows keeps for a device"),
        ('{"text": "a", "id": "Con.1"}', "that Windows keeps for a device"),
        ('{"text": "a", "id": true}', "the id is True"),
        ('{"text": "a", "id": "A"}', "the id 'A' is that of line 1 too"),
        ('{"text": "a", "voice": "none.wav"}', "The recording 'none.wav' does not exist; the name of a voice needs --"),
        ('{"text": "a", "voice": 3}', "the voice is 3"),
        ('{"text": "a", "audio_prompt_path": "none.wav"}', "there is no recording 'none.wav'"),
        ('{"text": "a", "voice": "c", "audio_prompt_path": "c"}', "give one"),
        ('{"text": "a", "language_id": "xx"}', "unknown language 'xx'; the model speaks en, fr"),
    ],
)
def test_lines_that_are_wrong(tmp_path, line, told):
    path = tmp_path / "p.jsonl"
    path.write_text('\ufeff{"text": "fine", "id": "a"}\n\n' + line + "\n")
    names = ("text", "language_id", "audio_prompt_path", "temperature")
    with pytest.raises(InvalidRequestError) as caught:
        read_prompts(path, names, 0, {}, ("en", "fr"))
    assert f"{path}: line 3: " in str(caught.value) and told in str(caught.value)
    assert str(caught.value).endswith("Nothing has been spoken.")


def test_lines_are_looked_at_before_anything_is_spoken(folder, capsys):
    write(folder, [LINES[0], *[{"tekst": "x"}] * 7])
    code, line = error(capsys, *ARGUMENTS)
    assert code == 1 and "line 2: unknown key 'tekst' (did you mean 'text'?)" in line and "and 2 more" in line
    assert not (folder / "out").exists()
    (folder / "p.jsonl").write_bytes(b'{"text": "a"}\n{"text": "Gr\xfc\xdfe"}\n')
    code, line = error(capsys, *ARGUMENTS)
    assert code == 1 and "line 2: not in UTF-8" in line
    for arguments, told in (
        (("--model", "vc"), "vc converts"),
        (("--slots", "0"), "--slots"),
        (("-o", "c.toml"), "c.toml"),
    ):
        code, line = error(capsys, *ARGUMENTS, *arguments)
        assert code == 2 and told in line
    (folder / "p.jsonl").write_text("\n")
    code, line = error(capsys, *ARGUMENTS)
    assert code == 1 and "has no lines" in line


def test_what_is_for_ray_is_refused_without_it(folder, capsys):
    code, line = error(capsys, *ARGUMENTS, "--actor-cpus", "2")
    assert code == 2 and "are for --ray" in line


def test_characters_that_end_a_line_elsewhere_do_not_in_json(tmp_path):
    path, text = tmp_path / "p.jsonl", "One\u2028two\u0085three."
    path.write_text("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for _ in range(2)), encoding="utf-8")
    assert [(one.number, one.item["text"]) for one in read_prompts(path, ("text",), 0, {})] == [(1, text), (2, text)]


def test_ids_and_defaults(tmp_path):
    path = tmp_path / "p.jsonl"
    (tmp_path / "v.wav").write_bytes(b"")
    lines = [{"text": "a"}, {"text": "b", "id": 7, "voice": str(tmp_path / "v.wav")}, {"text": "c", "id": "Zürich 1"}]
    write(tmp_path, lines)
    found = read_prompts(path, ("text", "audio_prompt_path"), 10, {"audio_prompt_path": "d.wav"})
    assert [(one.number, one.name, one.item["seed"]) for one in found] == [
        (1, "1", 11),
        (2, "7", 12),
        (3, "Zürich 1", 13),
    ]
    assert [one.item["audio_prompt_path"] for one in found] == ["d.wav", str(tmp_path / "v.wav"), "d.wav"]
    assert digest_of(found[1]) != digest_of(found[1], "fast") and digest_of(found[1]) == digest_of(found[1])


def test_lines_name_voices_of_a_folder(models, prebuilt, folder, capsys, voice):
    """A name, else a recording, else ``--voice``; what is finished is spoken again where its voice has changed."""
    voices = folder / "voices"
    for name, recording in (("other", str(reference_voice())), ("anna", voice)):
        assert main(["voices", "add", name, recording, "--folder", "voices", "--synthetic"]) == 0
    (voices / "ben.safetensors").write_bytes((voices / "anna.safetensors").read_bytes())
    lines = [{"text": "Fox.", "seed": 1, "voice": "anna"}, {"text": "Fox.", "seed": 1}]
    write(folder, [*lines, {**lines[1], "voice": voice}, {**lines[1], "audio_prompt_path": str(reference_voice())}])
    with_folder = [*ARGUMENTS, "--voice-folder", "voices"]
    assert main([*with_folder, "--voice", "ben"]) == 0
    one, two, three, four = (samples(folder, f"{number}.wav") for number in range(1, 5))
    assert np.abs(one - two).max() < 1e-3 and np.abs(one - three).max() < 1e-3  # the same voice, three ways
    assert one.shape != four.shape or np.abs(one - four).max() > 1e-2
    (voices / "other.safetensors").replace(voices / "anna.safetensors")
    turbo.revert(models("english"))  # the next command has a model of its own
    capsys.readouterr()
    assert main([*with_folder, "--voice", "ben"]) == 0
    assert "out: 1 of 1 lines" in capsys.readouterr().out
    now = samples(folder, "1.wav")
    assert now.shape == four.shape and np.abs(now - four).max() < 1e-3  # anna's other recording


def test_a_voice_that_is_not_there_is_told_with_its_line(folder, capsys, models):
    model = models("turbo")
    (folder / "voices").mkdir()
    with turbo.optimized(model, {"decoding": {"kernel": "torch"}}) as applied:
        applied.turbo.voices.add("anna", model.conds)
        applied.turbo.voices.save(folder / "voices")
    write(folder, [LINES[0], {"text": "Hi.", "voice": "ana"}, {"text": "Hi.", "voice": "voices"}])
    code, line = error(capsys, *ARGUMENTS, "--voice-folder", "voices")
    assert code == 1 and "line 2: There is no voice 'ana' in 'voices' (did you mean 'anna'?), and no recording" in line
    assert "line 3: There is no voice 'voices'" in line and not (folder / "out").exists()
    code, line = error(capsys, *ARGUMENTS, "--voice-folder", "voices", "--voice", "ana")
    assert code == 1 and "did you mean 'anna'?" in line
    code, line = error(capsys, *ARGUMENTS, "--voice", "anna")
    assert code == 2 and "'anna' does not exist" in line and "--voice-folder" in line
    write(folder, [{"text": "Hi.", "voice": "anna"}])  # another family's
    code, line = error(capsys, *ARGUMENTS, "--voice-folder", "voices")
    assert code == 1 and "does not fit this model" in line and not list((folder / "out").iterdir())


@pytest.mark.exhaustive
def test_an_interrupt_and_the_rest(folder, saved, capsys):
    """Ctrl-C after the first results: what is there stays, the same command speaks the others."""
    write(folder, [{"text": f"Fox number {number}."} for number in range(8)])
    checkpoint = ("--checkpoint", str(saved("english")), "--size", "tiny", "--config", "c.toml", "--slots", "1")
    arguments = ("batch", "p.jsonl", "-o", "out", *checkpoint)
    running, end = started(folder, *arguments), time.monotonic() + 600
    while running.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
        if (folder / "out" / "results.jsonl").exists() and (folder / "out" / "results.jsonl").read_bytes():
            running.send_signal(signal.SIGINT)
            break
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    before = [one["id"] for one in results(folder)]
    assert 0 < len(before) < 8 and f"{len(before)} of 8 lines are finished: the same command goes on" in err
    assert main([*arguments]) == 0
    shown = capsys.readouterr()
    assert f"{len(before)} of 8 lines are finished already" in shown.err and f"out: {8 - len(before)} of" in shown.out
    after = [one["id"] for one in results(folder)]
    assert after[: len(before)] == before and sorted(after, key=int) == [str(number) for number in range(1, 9)]
    assert not list((folder / "out").glob(".*"))
