"""Training a Vocos: killed and resumed runs, what stops one, what is kept on disk."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from cli_tools import started
from safetensors.torch import load_file
from training_tools import MEL, SETTINGS, mel_function, run, source, write_recordings

from chatterbox_turbo.errors import InvalidRequestError, ModelUnavailableError, TrainingError
from chatterbox_turbo.runtime.s3gen import vocos_checkpoint
from chatterbox_turbo.training import state, validation
from chatterbox_turbo.training.networks import Discriminators
from chatterbox_turbo.training.trainer import _accelerator


class Killed(BaseException):
    """What nobody handles."""


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="module")
def unbroken(audio, tmp_path_factory):
    """A run of four steps, and how often it put something in place."""
    folder, places = tmp_path_factory.mktemp("runs") / "unbroken", []
    with pytest.MonkeyPatch.context() as patch:
        _count(patch, lambda: places.append(1))
        result = run(audio, folder)
    assert result.finished and result.step == 4
    return folder, len(places)


def _count(patch, each):
    """Call ``each`` before anything is put in place, whatever it is."""
    replace_file, rename = os.replace, Path.rename

    def counted(function):
        def call(*arguments):
            each()
            return function(*arguments)

        return call

    patch.setattr(os, "replace", counted(replace_file))
    patch.setattr(Path, "rename", counted(rename))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (newest,) = (folder / "states").iterdir()
    return load_file(newest / state.WEIGHTS)


def told(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def check_same(folder: Path, reference: Path) -> None:
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert told(folder) == told(reference)
    for path in (folder, reference):
        assert not [one for one in path.rglob(".*") if one.is_file() or one.is_dir()], "something hidden is left"
    names = [{p.relative_to(path).as_posix() for p in path.rglob("*")} for path in (folder, reference)]
    assert names[0] == names[1]


@pytest.mark.exhaustive
def test_a_run_killed_wherever_it_writes_gives_the_same_weights(audio, unbroken, tmp_path, monkeypatch):
    reference, places = unbroken
    assert places > 12  # run.json, four states, two checkpoints with samples and pictures, history
    folder = tmp_path / "run"
    # before run.json; in a validation before the samples, before the checkpoint; behind two states; before a picture
    for last in (1, 4, 3, 7, 5):
        left = [last]

        def each(left=left):
            left[0] -= 1
            if not left[0]:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            _count(patch, each)
            with pytest.raises(Killed):
                run(audio, folder)
    run(audio, folder)
    check_same(folder, reference)


@pytest.mark.exhaustive
def test_a_process_that_is_killed_while_it_writes_a_state(audio, unbroken, tmp_path):
    tool = Path(__file__).with_name("training_tools.py")
    path = os.pathsep.join([str(tool.parents[1]), os.environ.get("PYTHONPATH", "")])
    tensors = len(weights(unbroken[0]))
    done = subprocess.run(
        [sys.executable, str(tool), str(audio), str(tmp_path / "run"), str(int(1.5 * tensors))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [one for one in (tmp_path / "run" / "states").iterdir() if one.name.startswith(".")]
    notes = []
    run(audio, tmp_path / "run", note=notes.append)
    assert any(note.startswith("going on after step") for note in notes)
    check_same(tmp_path / "run", unbroken[0])


def test_an_end_that_is_asked_for_saves_and_goes_on(audio, unbroken, tmp_path):
    settings, steps = replace(SETTINGS, save_every=100, validate_every=100), []
    result = run(
        audio, tmp_path / "run", settings, progress=lambda one: steps.append(one.step), stopping=lambda: 2 in steps
    )
    assert (result.step, result.finished, result.checkpoint) == (3, False, None)
    run(audio, tmp_path / "run", settings)
    ours, theirs = weights(tmp_path / "run"), weights(unbroken[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.exhaustive
def test_a_signal_to_the_whole_group_saves_and_goes_on(audio, tmp_path):
    size = ("--dim", "16", "--layers", "1", "--discriminator-width", "0.0625", "--batch", "2", "--frames", "8")
    steps = ("--steps", "1000000", "--mel-only-steps", "1000000", "--save-every", "1000000", "--workers", "2")
    arguments = ("vocoder", "train", "--audio", str(audio), "-o", "run", "--device", "cpu")
    running = started(tmp_path, *arguments, *size, *steps)
    end = time.monotonic() + 300
    while running.poll() is None and time.monotonic() < end and not (tmp_path / "run" / "history.jsonl").exists():
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGTERM)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130 and "the same command goes on in run" in err, err
    (saved,) = (tmp_path / "run" / "states").iterdir()
    assert f"stopped after step {int(saved.name.split('-')[1]):,};" in err


@pytest.mark.exhaustive
def test_other_seeds_give_other_weights_and_workers_the_same(audio, unbroken, tmp_path):
    run(audio, tmp_path / "other", replace(SETTINGS, seed=1))
    ours, theirs = weights(tmp_path / "other"), weights(unbroken[0])
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
    run(audio, tmp_path / "workers", workers=1)
    check_same(tmp_path / "workers", unbroken[0])


def test_what_a_finished_run_leaves(audio, unbroken):
    folder, _ = unbroken
    result = run(audio, folder)  # nothing is left to do
    assert result.finished and not result.seconds
    assert result.checkpoint.parent == folder / "checkpoints"
    described = vocos_checkpoint.read_description(result.checkpoint)
    assert described.mel == MEL and described.architecture.dim == 16
    assert {"log-mel distance", "STFT distance", "periodicity error"} <= described.validation.keys()
    assert described.training["steps"] in (2, 4) and described.training["data"] == "3 recordings"
    network, every = vocos_checkpoint.load(folder / "checkpoints" / "step-00000004"), weights(folder)
    for name, value in network.state_dict().items():
        assert torch.equal(value, every[f"generator.network.{name}"]), name
    samples, rate = soundfile.read(folder / "samples" / "step-00000004" / "0.wav")
    assert rate == 24000 and len(samples) == 12000
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 4]
    assert lines[0]["losses"].keys() == {"generator: total", "mel"}  # one step without discriminators
    assert {"periods: told apart", "resolutions: fooled", "resolutions: features"} <= lines[2]["losses"].keys()
    assert lines[2]["seconds"].keys() == {"data", "generator", "discriminators"}
    assert min(lines[2]["seconds"].values()) > 0 == lines[0]["seconds"]["discriminators"]


def test_it_learns(audio, tmp_path):
    settings = replace(SETTINGS, steps=60, learning_rate=3e-3, mel_only_steps=60, save_every=60, validate_every=60)
    run(audio, tmp_path / "run", settings)
    losses = [line["losses"]["mel"] for line in told(tmp_path / "run") if "losses" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_both_halves_change(unbroken, audio):
    every = weights(unbroken[0])
    halves = {name.split(".")[0] for name in every}
    assert halves == {
        half + moment for half in ("generator", "discriminators")
        for moment in ("", "'s step", "'s exp_avg", "'s exp_avg_sq")
    }  # fmt: skip
    assert {float(v) for n, v in every.items() if n.startswith("generator's step")} == {4.0}
    assert {float(v) for n, v in every.items() if n.startswith("discriminators's step")} == {3.0}
    moments = [v.abs().max() for n, v in every.items() if "exp_avg_sq" in n]
    assert sum(float(moment) > 0 for moment in moments) > 0.9 * len(moments)


def test_bf16_trains_and_transforms_stay_in_fp32(audio, tmp_path):
    settings = replace(SETTINGS, precision="bf16", steps=2)
    run(audio, tmp_path / "run", settings)
    every = weights(tmp_path / "run")
    assert {value.dtype for value in every.values()} == {torch.float32}
    first = next(line["losses"]["mel"] for line in told(tmp_path / "run") if "losses" in line)
    run(audio, tmp_path / "fp32", replace(settings, precision="no"))
    exact = next(line["losses"]["mel"] for line in told(tmp_path / "fp32") if "losses" in line)
    assert first != exact and first == pytest.approx(exact, rel=0.02)


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_state(audio, tmp_path):
    settings = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(TrainingError, match="has a loss that is no finite number") as caught:
        run(audio, tmp_path / "run", settings)
    assert "lower learning rate" in str(caught.value)
    kept = [value for value in weights(tmp_path / "run").values()]
    assert kept and all(math.isfinite(float(value.abs().max())) for value in kept if value.numel())


def test_a_full_disk_ends_the_run_and_the_same_call_goes_on(audio, unbroken, tmp_path, monkeypatch):
    own, left = state.TensorFile.write, [int(1.5 * len(weights(unbroken[0])))]

    def full(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(self, *arguments)

    monkeypatch.setattr(state.TensorFile, "write", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*was saved before is whole.*same command"):
        run(audio, tmp_path / "run")
    monkeypatch.undo()
    run(audio, tmp_path / "run")
    check_same(tmp_path / "run", unbroken[0])


def test_a_run_goes_on_with_its_own_settings_only(audio, unbroken, tmp_path):
    with pytest.raises(TrainingError, match="layers was 1, and is 2 now"):
        run(audio, unbroken[0], replace(SETTINGS, layers=2))
    with pytest.raises(TrainingError, match="audio was None, and is 'b' now"):
        run(audio, unbroken[0], data={"audio": "b"})
    with pytest.raises(TrainingError, match="is no training run"):
        run(audio, audio)


def test_a_damaged_state_is_told(audio, tmp_path):
    run(audio, tmp_path / "run", replace(SETTINGS, steps=1))
    (newest,) = (tmp_path / "run" / "states").iterdir()
    (newest / state.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"is damaged.*Delete that folder"):
        run(audio, tmp_path / "run", replace(SETTINGS, steps=1))


def test_the_best_checkpoint_and_the_newest_are_kept(unbroken, tmp_path):
    folder = state.RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    network = vocos_checkpoint.load(unbroken[0] / "checkpoints" / "step-00000004")
    for step, distance in ((1, 0.5), (2, 0.2), (3, 0.4), (4, 0.3)):
        validation.write_checkpoint(folder, step, network, {validation.RANKED: distance}, {})
        validation.keep_best_and(folder, step)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    assert validation.best(folder).name == "step-00000002"


def test_discriminators_are_the_packages_own_and_may_be_narrower():
    from vocos.discriminators import MultiPeriodDiscriminator, MultiResolutionDiscriminator

    made = Discriminators(1 / 16)
    assert type(made.periods) is MultiPeriodDiscriminator and type(made.resolutions) is MultiResolutionDiscriminator
    first = made.periods.discriminators[0]
    assert [conv.out_channels for conv in first.convs] == [2, 8, 32, 64, 64]
    assert (first.convs[0].in_channels, first.conv_post.out_channels) == (1, 1)
    with torch.device("meta"):
        assert Discriminators().periods.discriminators[0].convs[4].out_channels == 1024


@pytest.mark.parametrize("missing", ["vocos.discriminators", "accelerate"])
def test_a_missing_package_is_named_with_its_remedy(audio, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelUnavailableError, match=r"pip install .chatterbox-turbo\[vocos"):
        run(audio, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 1.5},
        {"learning_rate": math.nan},
        {"discriminator_width": 0.0},
        {"precision": "int8"},
        {"mel_windows": ()},
        {"mel_windows": (1024.0,)},
        {"mel_windows": (1024, 16)},
        {"s3gen_mel_weight": -1.0},
    ],
)
def test_settings_that_are_none(change):
    with pytest.raises(InvalidRequestError, match=next(iter(change))):
        replace(SETTINGS, **change)


def test_a_run_may_begin_with_a_checkpoint(audio, unbroken, tmp_path):
    checkpoint = unbroken[0] / "checkpoints" / "step-00000004"
    before = vocos_checkpoint.load(checkpoint).state_dict()
    still = replace(SETTINGS, steps=1, learning_rate=0.0)
    for settings, same in ((still, True), (replace(still, learning_rate=1e-3), False)):
        out = tmp_path / str(same)
        run(audio, out, settings, initial=vocos_checkpoint.load(checkpoint), data={"begin_with": "it"})
        after = vocos_checkpoint.load(out / "checkpoints" / "step-00000001").state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items()) is same
    with pytest.raises(TrainingError, match="begin_with was 'it'"):
        run(audio, out, settings, data={})
    wider = replace(SETTINGS, dim=32)
    with pytest.raises(InvalidRequestError, match="The network to begin with is"):
        run(audio, tmp_path / "wider", wider, initial=vocos_checkpoint.load(checkpoint))
    assert not (tmp_path / "wider").exists()


def test_half_precision_that_a_device_lacks():
    with pytest.raises(InvalidRequestError, match="fp16"):
        _accelerator("fp16", "cpu")


def test_validation_leaves_the_network_in_training_mode(audio, unbroken):
    network = vocos_checkpoint.load(unbroken[0] / "checkpoints" / "step-00000004").train()
    figures, made = validation.validate(network, source(audio).held_out(), mel_function(), 24000, torch.device("cpu"))
    assert network.training and len(made) == 1 and figures["log-mel distance"] > 0
