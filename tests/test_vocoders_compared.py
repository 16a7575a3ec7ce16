"""How far vocoders are from recordings, the teacher's data, and the command ``vocoder``."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cli_tools import command, error, watermark_in
from training_tools import MEL, mel_function, voiced, write_recordings

import chatterbox_turbo as turbo
from chatterbox_turbo.cli import main
from chatterbox_turbo.cli.vocoder import PrecisionName
from chatterbox_turbo.errors import TrainingError
from chatterbox_turbo.measure import distances, vocoders
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.s3gen import vocos_checkpoint
from chatterbox_turbo.runtime.s3gen.vocos_network import VocosArchitecture, build
from chatterbox_turbo.training.recordings import find
from chatterbox_turbo.training.settings import PRECISIONS
from chatterbox_turbo.training.teacher import TeacherData
from chatterbox_turbo.upstream.families import identify

SMALL = ("--dim", "16", "--layers", "1", "--discriminator-width", "0.0625", "--batch", "2", "--frames", "8")
QUICK = ("--validate-every", "1", "--save-every", "1", "--workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("audio"), 3, 2.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("vocoders") / "small"
    vocos_checkpoint.write(folder, build(VocosArchitecture(16, 24, 1), MEL))
    return folder


def wave(*arguments, **options):
    return torch.from_numpy(voiced(*arguments, **options))


def test_the_same_samples_have_no_distance():
    found = distances.distances(wave(1.0), wave(1.0), 24000, mel_function())
    assert found.keys() >= {*distances.NAMES} - {"PESQ"}
    assert [found[name] for name in distances.NAMES[:3]] == [0, 0, 0]
    assert found["voicing F1"] == 1 and found["pitch error cents"] == 0


def test_more_noise_is_further_away():
    reference, noise = wave(1.0), torch.randn(24000, generator=torch.Generator().manual_seed(1))
    some, more = (distances.distances(reference + a * noise, reference, 24000, mel_function()) for a in (0.01, 0.1))
    for name in distances.NAMES[:4]:
        assert 0 < some[name] < more[name], name


def test_another_pitch_is_told_in_cents():
    found = distances.periodicity(wave(1.0, pitch=200.0), wave(1.0, pitch=100.0), 24000)
    assert found["pitch error cents"] == pytest.approx(1200, rel=0.1) and found["voicing F1"] > 0.9
    noise = 0.1 * torch.randn(24000, generator=torch.Generator().manual_seed(1))
    unvoiced = distances.periodicity(noise, wave(1.0), 24000)
    assert unvoiced["voicing F1"] < 0.3 and unvoiced["periodicity error"] > 0.4


def test_silence_has_no_pitch_and_no_pesq():
    found = distances.distances(torch.zeros(9600), torch.zeros(9600), 24000, mel_function())
    assert found.keys() == {"log-mel distance", "short-window log-mel distance", "STFT distance"}


def test_pesq_is_measured_where_it_is_installed(monkeypatch):
    pesq = pytest.importorskip("pesq")
    monkeypatch.setattr(
        pesq, "pesq", lambda rate, reference, ours, mode: (rate, len(ours), mode) == (16000, 16000, "wb")
    )
    assert distances.pesq(wave(1.0), wave(1.0), 24000) == 1.0
    monkeypatch.setitem(__import__("sys").modules, "pesq", None)
    assert np.isnan(distances.pesq(wave(1.0), wave(1.0), 24000))


def test_means_are_of_those_that_have_a_figure():
    assert distances.mean([{"PESQ": 2.0}, {}, {"PESQ": 4.0, "STFT distance": 1.0}]) == {
        "STFT distance": 1.0,
        "PESQ": 3.0,
    }


def test_griffin_lim_lies_where_the_recording_does():
    reference, function = wave(1.0), mel_function()
    made = vocoders.griffin_lim(MEL, torch.device("cpu"))(function(reference[None]))
    assert made.shape == (1, 24000)
    found = distances.log_mel_distance(made[0], reference, function)
    moved = distances.log_mel_distance(torch.roll(made[0], 480), reference, function)
    assert found < 0.6 and found < moved


@pytest.mark.parametrize("model", ["english", "vc"], indirect=True)
def test_vocoders_side_by_side(model, checkpoint, samples):
    parts, network = identify(model), vocos_checkpoint.load(checkpoint)
    samples = [samples[:48000], samples[48000:96000]]  # speech: PerTh cannot mark every tone
    rows = vocoders.vocoders(parts, network, MEL)
    assert list(rows) == ["HiFT", "Vocos", "Griffin-Lim"]
    done = []
    result = vocoders.evaluate(parts, samples, rows, MEL, keep=1, progress=done.append)
    assert done == [1, 2] and (result.count, result.seconds) == (2, 4.0) and len(result.heard) == 1
    assert list(result.figures) == ["recording", *rows]
    own = result.figures["recording"]
    assert own["log-mel distance"] == 0 and own["watermark found"] == 0 and "seconds a second" not in own
    for name in rows:
        figures = result.figures[name]
        assert figures["watermark found"] == 1 or name == "Vocos"  # whose random weights make noise: PerTh marks speech
        assert figures["seconds a second"] > 0
        assert figures["log-mel distance"] > 0 and -1 <= figures["speaker similarity"] <= 1.001
    assert result.figures["Griffin-Lim"]["log-mel distance"] < result.figures["Vocos"]["log-mel distance"]
    assert np.array_equal(result.heard[0]["recording"], samples[0])


def data(folder, audio, count=3, batch=2):
    return TeacherData(folder, find(audio), count, 0, 24000, 480, batch)


@pytest.mark.parametrize("model", ["english"], indirect=True)
def test_the_teachers_data_are_what_its_flow_and_hift_make(model, audio, tmp_path):
    turbo.apply(model, {"decoding": {"enabled": False}, "warmup": {"level": "off"}})
    whole, told = data(tmp_path / "whole", audio), []
    assert not whole.complete("a model")
    assert whole.make(model, "a model", lambda done, words: told.append(done)) and told == [0, 2, 3]
    assert whole.complete("a model")
    for other, identity in ((whole, "another model"), (data(tmp_path / "whole", audio, 2), "a model")):
        with pytest.raises(TrainingError, match="another teacher"):
            other.complete(identity)
    # interrupted after the first batch, and one of its items lost
    broken = data(tmp_path / "broken", audio)
    assert not broken.make(model, "a model", stopping=iter([False, True]).__next__)
    (tmp_path / "broken" / "000001.safetensors").unlink()
    assert broken.make(model, "a model")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "broken").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    with pytest.raises(TrainingError, match=r"another teacher.*model"):
        broken.make(model, "another model")
    # the samples are HiFT's of the mel frames: with upstream's own, from another source of noise, as near as that is
    item = whole.segments(0, 10, 60).held_out()[0]
    assert item.mel.shape[1] * 480 == len(item.samples) and item.samples.abs().max() > 0
    part = whole.segments(0, 10, 60).segment(3)
    assert part.mel.shape == (80, 10) and part.samples.shape == (4800,)
    assert part.name != item.name


@pytest.mark.parametrize("model", ["english"], indirect=True)
def test_one_item_is_upstreams_own(model, audio, tmp_path):
    """The stages of upstream, seeded as the item is."""
    turbo.apply(model, {"decoding": {"enabled": False}, "warmup": {"level": "off"}})
    made = data(tmp_path / "data", audio, 1)
    made.make(model, "a model")
    parts = identify(model)
    utterance = made._utterance(parts, 0)
    turbo.revert(model)
    with utterance.draws.own(), torch.inference_mode():
        mel = model.s3gen.flow_inference(utterance.tokens, ref_dict=dict(utterance.voice.gen), finalize=True)
        samples = model.s3gen.hift_inference(mel, None)[0]
    from safetensors.torch import load_file

    ours = load_file(tmp_path / "data" / "000000.safetensors")["mel"]
    assert snr_db(ours, mel[0].clone()) > 60
    sound = torch.from_numpy(soundfile.read(tmp_path / "data" / "000000.flac", dtype="float32")[0])
    assert snr_db(sound, samples[0].clone()) > 50


def test_precisions_of_the_command_are_those_of_the_settings():
    assert tuple(each.value for each in PrecisionName) == PRECISIONS


@pytest.mark.exhaustive
def test_a_run_of_the_command_and_its_evaluation(audio, tmp_path, capsys):
    arguments = ["vocoder", "train", "--audio", str(audio), "-o", str(tmp_path / "run"), *SMALL, *QUICK]
    assert main([*arguments, "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert "a step: data " in said.out and "best checkpoint: " in said.out and "2 steps on 2 recordings" in said.out
    assert "training: step 2 of 2, mel loss" in said.err
    assert main([*arguments, "--steps", "2"]) == 0  # nothing is left to do
    assert "a step" not in capsys.readouterr().out
    code, line = error(capsys, *arguments, "--steps", "3")
    assert code == 1 and "steps was 2, and is 3 now" in line
    newest = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    out = tmp_path / "out"
    code = main(
        [
            "vocoder",
            "evaluate",
            "--audio",
            str(audio),
            "--vocoder",
            newest,
            "-o",
            str(out),
            "--synthetic",
            "--count",
            "1",
        ]
    )
    assert code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("HiFT", "Vocos", "Griffin-Lim", "recording", "speaker similarity"))
    assert watermark_in(out / "0-vocos.wav") == pytest.approx(2.0)
    evaluate = ["vocoder", "evaluate", "--audio", str(audio), "--synthetic", "--count", "1", "--seconds", "1"]
    capsys.readouterr()  # PerTh's own detector has printed
    assert main([*evaluate, "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["recordings"] == 1 and "Griffin-Lim" in shown.err
    for more in (["--json", str(tmp_path / "none" / "a.json")], ["-o", str(out / "evaluation.json")]):
        code, line = error(capsys, *evaluate, *more)
        assert code == 2 and "cannot" in line
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json", "spectrograms.png", "0-recording.wav", "0-hift.wav", "0-vocos.wav", "0-griffin-lim.wav"
    }  # fmt: skip
    assert json.loads((out / "evaluation.json").read_text())["rows"]["HiFT"]["watermark found"] == 1


def test_recordings_may_come_and_go_until_a_run_has_begun(audio, tmp_path, capsys):
    recordings, out = tmp_path / "recordings", tmp_path / "run"
    recordings.mkdir()
    soundfile.write(recordings / "silence.wav", np.zeros(24000), 24000)
    arguments = ["vocoder", "train", "--audio", str(recordings), "-o", str(out), *SMALL, *QUICK, "--steps", "1"]
    code, line = error(capsys, *arguments)
    assert code == 1 and "can be trained on" in line and not (out / "run.json").exists()
    for path in audio.iterdir():
        # a name that is no text: as another encoding of file names leaves it
        name = os.fsencode(recordings) + b"/\xe9" + path.name.encode()
        Path(os.fsdecode(name)).write_bytes(path.read_bytes())
    assert main(arguments) == 0
    assert "1 steps on 3 recordings" in capsys.readouterr().out
    (recordings / "more.wav").write_bytes(b"")
    assert main(arguments) == 0, "the recordings are those that it began with"


def test_distillation_by_the_command(audio, tmp_path, capsys):
    arguments = ["vocoder", "train", "--audio", str(audio), "-o", str(tmp_path / "run"), *SMALL, *QUICK]
    arguments += ["--steps", "1", "--teacher", "synthetic", "--teacher-items", "2", "--model", "vc"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert "teacher: 2 items of 2" in capsys.readouterr().err
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    described = vocos_checkpoint.read_description(checkpoint)
    assert described.training["data"] == "1 utterances of vc, synthetic tiny"
    code, line = error(capsys, *arguments[:-1], "english")
    assert code == 1 and "teacher" in line


def test_a_run_begins_with_the_weights_and_sizes_of_a_checkpoint(audio, checkpoint, tmp_path):
    small = ("--discriminator-width", "0.0625", "--batch", "2", "--frames", "8", *QUICK, "--steps", "1")
    arguments = ("vocoder", "train", "--audio", str(audio), "-o", "run", *small)
    begun = ("--begin-with", str(checkpoint))
    done = command(tmp_path, *arguments, "--learning-rate", "0", *begun)
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "run" / "checkpoints").iterdir()
    before, after = (vocos_checkpoint.load(folder) for folder in (checkpoint, made))
    assert after.architecture == before.architecture
    theirs = before.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in after.state_dict().items())
    sizes = ("--dim", "16", "--intermediate-dim", "24", "--layers", "1")
    refused = command(tmp_path, *arguments, "--learning-rate", "0", *sizes)  # another run than this, whose folder it is
    assert refused.returncode == 1 and "begin_with was" in refused.stderr.splitlines()[-1], refused.stderr
    nothing = command(tmp_path, *arguments[:5], "other", *small, "--begin-with", "nowhere")
    assert nothing.returncode == 1 and "nowhere" in nothing.stderr.splitlines()[-1]
    assert not (tmp_path / "other").exists()


def test_bad_arguments(audio, checkpoint, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    code, line = error(capsys, "vocoder", "train", "--audio", str(empty), "-o", str(tmp_path / "run"))
    assert code == 1 and "There are no recordings in" in line and not (tmp_path / "run").exists()
    code, line = error(capsys, "vocoder", "train", "--audio", str(audio), "-o", str(audio))
    assert code == 1 and "is no training run" in line
    code, line = error(
        capsys, "vocoder", "train", "--audio", str(audio), "-o", str(tmp_path / "run"), "--teacher", "nobody"
    )
    assert code == 2 and "neither a checkpoint folder nor 'synthetic'" in line
    other = tmp_path / "other"
    vocos_checkpoint.write(other, build(VocosArchitecture(16, 24, 1), replace(MEL, fmax=12000.0)))
    code, line = error(capsys, "vocoder", "evaluate", "--audio", str(audio), "--vocoder", str(other), "--synthetic")
    assert code == 1 and "trained on other mel frames" in line
