"""What is made of a run's validations: figures, samples to listen to, a vocoder checkpoint, a picture of the curves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

from ..errors import ModelUnavailableError
from ..measure.distances import distances, mean
from ..runtime.s3gen import vocos_checkpoint
from ..runtime.s3gen.vocos_network import VocosNetwork
from .segments import Segment
from .state import RunFolder, full_disk, name_of

HEARD = 4  # segments whose samples are written
RANKED = "log-mel distance"


@torch.no_grad()
def validate(
    network: VocosNetwork, segments: Sequence[Segment], mel: Callable[[Tensor], Tensor], rate: int, device: torch.device
) -> tuple[dict[str, float], list[Tensor]]:
    """Mean figures over segments, and the samples (n,) that the network makes of each."""
    network.eval()
    try:
        each, made = [], []
        for segment in segments:
            reference = segment.samples.to(device)
            given = mel(reference[None]) if segment.mel is None else segment.mel[None].to(device)
            samples = network(given)[0].clamp(-1, 1)
            each.append(distances(samples, reference, rate, mel))
            made.append(samples.cpu())
    finally:
        network.train()
    return mean(each), made


def write_samples(folder: RunFolder, step: int, segments: Sequence[Segment], made: Sequence[Tensor], rate: int) -> None:
    """WAV files of the first segments: the recordings once, what was made of them for each step."""
    with full_disk("write samples"):
        for name, every in (("recording", [s.samples for s in segments]), (name_of(step), made)):
            target = folder.path / "samples" / name
            if name == "recording" and all((target / f"{n}.wav").exists() for n in range(len(every[:HEARD]))):
                continue
            target.mkdir(parents=True, exist_ok=True)
            for number, samples in enumerate(every[:HEARD]):
                new = target / f".{number}.wav"
                try:
                    soundfile.write(new, samples.numpy(), rate, format="WAV", subtype="PCM_16")
                except soundfile.SoundFileError as error:  # a full disk, among others
                    raise OSError(str(error)) from error
                os.replace(new, target / f"{number}.wav")


def write_checkpoint(
    folder: RunFolder, step: int, network: VocosNetwork, figures: Mapping[str, float], training: Mapping[str, Any]
) -> None:
    """A vocoder checkpoint; one of the same step, of a process that was killed, is replaced."""
    target = folder.checkpoints / name_of(step)
    with full_disk("write a checkpoint"):
        shutil.rmtree(target, ignore_errors=True)
        vocos_checkpoint.write(target, network, figures, training)


def best(folder: RunFolder) -> Path | None:
    """The checkpoint with the least log-mel distance to its held-out recordings; the later one of equals."""
    ranked = []
    for path in sorted(folder.checkpoints.glob("step-*")):
        try:
            figures = vocos_checkpoint.read_description(path).validation
        except ModelUnavailableError:  # of a process that was killed while it replaced it
            continue
        ranked.append((figures.get(RANKED, float("inf")), path))
    return min(reversed(ranked), key=lambda one: one[0])[1] if ranked else None


def keep_best_and(folder: RunFolder, step: int) -> None:
    """Delete every checkpoint but the best one and that of a step."""
    kept = best(folder)
    for path in folder.checkpoints.glob("step-*"):
        if path not in (kept, folder.checkpoints / name_of(step)):
            shutil.rmtree(path, ignore_errors=True)
