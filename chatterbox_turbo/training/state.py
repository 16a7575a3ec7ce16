"""A run's folder: what it needs to go on after a kill at any point, as safetensors and JSON, each whole or not there.

    run.json                 settings and data, written once
    recordings.json          names of the files, so that the same ones are drawn from after others were added
    states/step-00000500/    weights, moments of the optimizers; the newest alone is kept
    history.jsonl            losses and validations, a line each
    checkpoints/step-…/      vocoder checkpoints: the best one and the newest
    samples/, curves.png     to listen to and to look at

Random numbers need no place: each is a function of the seed and a step's number (``segments``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import LONG, TrainingError, brief
from ..runtime.loading.new_folder import check_destination, new_folder, remove_unfinished
from ..runtime.loading.tensor_file import TensorFile, form_of
from .step import Training

WEIGHTS, NAME, RUN = "state.safetensors", "state.json", "run.json"
FORMAT, VERSION = "chatterbox-turbo vocoder training", 1
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.states, self.checkpoints = path / "states", path / "checkpoints"

    def open(self, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Make the folder, or go on with it.

        Raises:
            TrainingError: it is something else's, or of a run with other settings or data.
        """
        run = self.path / RUN
        wanted = {"format": FORMAT, "version": VERSION, "settings": dict(settings), "data": dict(data)}
        if not run.is_file():
            if self.path.exists() and (not self.path.is_dir() or self._strange()):
                raise TrainingError(
                    f"{brief(str(self.path), LONG)} exists already, and is no training run.",
                    f"It has no {RUN}.",
                    "Name a folder that does not exist.",
                )
            with full_disk("begin"):
                for folder in (self.path, self.states, self.checkpoints):
                    folder.mkdir(parents=True, exist_ok=True)
                write_json(run, wanted)
            return
        found = read_json(run)
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise TrainingError(f"{run} is of another format.", "Another release has written it.", "Begin another run.")
        # as JSON has it: what was written has been through that
        differing = _differences(found, json.loads(json.dumps(wanted)))
        if differing:
            raise TrainingError(
                f"{brief(str(self.path), LONG)} is a run with other settings: {'; '.join(differing)}.",
                "Going on with these would give weights that no run gives.",
                "Repeat them as they were, or name another folder.",
            )
        for folder in (self.states, self.checkpoints):
            folder.mkdir(exist_ok=True)

    def _strange(self) -> set[str]:
        """What is in the folder that is not put there before ``run.json``."""
        early = {"recordings.json", "teacher", "states", "checkpoints", f".{RUN}.new", ".recordings.json.new"}
        return {path.name for path in self.path.iterdir()} - early

    def newest(self) -> int:
        """The step of the newest state; 0 where there is none."""
        return max((int(path.name.split("-")[1]) for path in self.states.glob("step-*")), default=0)

    def save(self, training: Training, step: int) -> None:
        """Write the state after ``step`` steps, and delete those before it.

        Raises:
            TrainingError: it cannot be written; the one before stays.
        """
        folder = self.states / name_of(step)
        tensors, scaler = collect(training), training.accelerator.scaler
        content = {"step": step, "scaler": None if scaler is None else scaler.state_dict()}
        with full_disk(f"save the state of step {step}"):
            remove_unfinished(folder)
            if folder.exists():
                return
            with new_folder(folder, check_destination) as new:
                with TensorFile(new / WEIGHTS, {name: form_of(value) for name, value in tensors.items()}) as file:
                    for name, value in tensors.items():
                        file.write(name, value)
                write_json(new / NAME, content)
        for other in self.states.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self, training: Training) -> int:
        """Put the newest state into networks and optimizers; its step, 0 where there is none.

        Raises:
            TrainingError: it is damaged.
        """
        step = self.newest()
        if not step:
            return 0
        folder = self.states / name_of(step)
        try:
            tensors, content = load_file(folder / WEIGHTS), read_json(folder / NAME)
            distribute(training, tensors)
        except TrainingError:
            raise
        except Exception as error:
            raise TrainingError(
                f"The state in {folder} is damaged ({error}).", "", "Delete that folder to begin anew."
            ) from error
        if content["scaler"] is not None and training.accelerator.scaler is not None:
            training.accelerator.scaler.load_state_dict(content["scaler"])
        return step


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    told = []
    for part in ("settings", "data"):
        ours, theirs = wanted.get(part, {}), found.get(part, {})
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                told.append(f"{name} was {brief(theirs.get(name))}, and is {brief(ours.get(name))} now")
    return told


def name_of(step: int) -> str:
    """A folder's name."""
    return f"step-{step:08d}"


def collect(training: Training) -> dict[str, Tensor]:
    """Weights and moments by name."""
    tensors: dict[str, Tensor] = {}
    for half in training.modules:
        module, optimizer = training.module(half), training.optimizers[half]
        tensors |= {f"{half}.{name}": value for name, value in module.state_dict().items()}
        kept = optimizer.state_dict()["state"]
        for number, (name, _) in enumerate(module.named_parameters()):
            for moment, value in kept.get(number, {}).items():
                tensors[f"{half}'s {moment}.{name}"] = torch.as_tensor(value)
    return tensors


def distribute(training: Training, tensors: Mapping[str, Tensor]) -> None:
    """What ``collect`` has collected, put back."""
    for half in training.modules:
        module, optimizer = training.module(half), training.optimizers[half]
        module.load_state_dict({name: tensors[f"{half}.{name}"] for name in module.state_dict()})
        content = optimizer.state_dict()
        content["state"] = {
            number: {moment: tensors[f"{half}'s {moment}.{name}"] for moment in MOMENTS}
            for number, (name, _) in enumerate(module.named_parameters())
            if f"{half}'s exp_avg.{name}" in tensors
        }
        optimizer.load_state_dict(content)


class History:
    """Lines of JSON; what a run that was killed wrote behind its last state is dropped when it goes on."""

    def __init__(self, path: Path, step: int):
        self._path, self.lines = path, []
        if path.is_file():
            self.lines = [line for line in _lines(path) if line["step"] <= step]
            with full_disk("write the history"):
                write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, **line: Any) -> None:
        """Append a line."""
        self.lines.append(line)
        with full_disk("write the history"), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:  # the last one, of a process that was killed
            return


@contextmanager
def full_disk(what: str) -> Iterator[None]:
    """An ``OSError`` of the body as one that says what to do.

    Raises:
        TrainingError: the body raised one.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot {what}: {error.strerror or error}.",
            "What was saved before is whole.",
            "Make room, and give the same command again: it goes on from there.",
        ) from error


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Likewise."""
    write_text(path, json.dumps(content, indent=1) + "\n")  # escaped: names of files need not be text


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        TrainingError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is damaged: {error}.", "", "Name another folder to begin anew.") from error
    return content
