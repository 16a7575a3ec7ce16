"""Distillation: mel frames that a model's flow makes of recordings, and the samples that its HiFT makes of those.

A vocoder that is trained on these hears the frames that it will be given, with the flow's own errors. Items are written
one by one; of a batch that was interrupted all are made again, for those beside it decide how an item is rounded.

    teacher.json          which model and recordings, how many items
    000000.flac           samples, 24 bits: what HiFT makes is within full scale
    000000.safetensors    mel frames (80, T) fp32; written last, so that an item that has them is whole
    000000.json           in place of both, for a recording of no use: why
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import TrainingError, describe
from ..runtime.voice.reference_audio import resample
from ..speech.utterance import Draws, Utterance
from ..upstream.families import identify
from .recordings import QUIETEST, Recordings, Unusable
from .segments import TRAINING, VALIDATION, Segment, order, split
from .state import full_disk, read_json, write_json

NAME, FORMAT = "teacher.json", "chatterbox-turbo teacher data"
SECONDS, SHORTEST = 9.0, 1.5  # of a recording: the first third is the voice, the rest is said again
LOW_RATE = 16_000  # Hz that the speech tokenizer listens at


@dataclass(frozen=True)
class TeacherData:
    """Items of a folder, made or to be made.

    Args:
        folder: of the data.
        recordings: what the model says again.
        count: items.
        rate, hop: Hz, and samples of a mel frame.
        batch: recordings that are looked at together.
    """

    folder: Path
    recordings: Recordings
    count: int
    seed: int
    rate: int
    hop: int
    batch: int = 8

    def make(
        self,
        model: Any,
        identity: str,
        progress: Callable[[int, str], None] = lambda done, words: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Make what is missing, with an optimized model; whether all is there now.

        Args:
            model: with the passes flow and vocoder where several are to be made at once.
            identity: of the model, by which data of another one are told.

        Raises:
            TrainingError: the folder is of another model or other recordings, the model's stages are unknown, or the
                disk is full.
        """
        self._open(identity)
        parts = identify(model)
        batches = [range(start, min(start + self.batch, self.count)) for start in range(0, self.count, self.batch)]
        done = sum(len(some) for some in batches if self._done(some))
        progress(done, f"{done:,} items of {self.count:,}")
        for some in batches:
            if self._done(some):
                continue
            if stopping():
                return False
            with model.turbo._working("teacher data") as now:
                if now._pipeline is None:
                    raise TrainingError(
                        "This model cannot teach.",
                        "The code of its generate is not a known one.",
                        "Train on recordings.",
                    )
                self._make(now._pipeline, parts, some)
            done += len(some)
            progress(done, f"{done:,} items of {self.count:,}")
        return True

    def complete(self, identity: str) -> bool:
        """Whether every item has been made, or found to be of no use.

        Raises:
            TrainingError: the folder is of another model or other recordings.
        """
        self._open(identity)
        return self._done(range(self.count))

    def segments(self, seed: int, frames: int, held: int) -> TeacherSegments:
        """What there is, for training; every item must have been made.

        Raises:
            TrainingError: no recording is of use.
        """
        numbers = [number for number in range(self.count) if self._path(number, ".safetensors").exists()]
        if not numbers:
            raise TrainingError(
                f"No recording in {self.recordings.folder} is of use to the teacher.",
                read_json(self._path(0, ".json"))["reason"],
                f"Give recordings of speech of 16 kHz and up, and delete {self.folder}.",
            )
        return TeacherSegments(self.folder, numbers, seed, frames, self.hop, held)

    def _open(self, identity: str) -> None:
        wanted = {"format": FORMAT, "version": 1, "model": identity, "audio": str(self.recordings.folder.resolve())}
        wanted |= {"count": self.count, "seed": self.seed, "batch": self.batch, "files": len(self.recordings.names)}
        path = self.folder / NAME
        with full_disk("write the teacher's data"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_json(path, wanted)
        found = read_json(path)
        if found != wanted:
            differing = ", ".join(name for name in wanted if found.get(name) != wanted[name])
            raise TrainingError(
                f"{self.folder} holds data of another teacher.", f"Not the same: {differing}.", "Name another folder."
            )

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}{suffix}"

    def _done(self, numbers: range) -> bool:
        there = (any(self._path(n, suffix).exists() for suffix in (".safetensors", ".json")) for n in numbers)
        return all(there)

    def _make(self, pipeline: Any, parts: Any, numbers: range) -> None:
        utterances = []
        for number in numbers:
            try:
                utterances.append(self._utterance(parts, number))
            except Unusable as error:
                with full_disk("write the teacher's data"):
                    write_json(self._path(number, ".json"), {"reason": str(error)})
        for some in pipeline.alike(utterances):
            for utterance, (mel, samples) in zip(some, pipeline.acoustics(some), strict=True):
                self._write(utterance.number, mel[0].float().cpu(), samples[0].float().cpu())

    @torch.inference_mode()
    def _utterance(self, parts: Any, number: int) -> Utterance:
        """The speech tokens of a part of a recording, in the voice of its beginning."""
        names, generator = self.recordings.names, np.random.default_rng([self.seed, TRAINING, number])
        epoch, place = divmod(number, len(names))
        name = names[order(self.seed, epoch, len(names))[place]]
        samples = self.recordings.read(name, generator.random(), int(SECONDS * self.rate), self.rate)
        if len(samples) < SHORTEST * self.rate:
            raise Unusable(f"{name}: {len(samples) / self.rate:.2f} s, at least {SHORTEST} are needed")
        if np.abs(samples).max() < QUIETEST:
            raise Unusable(f"{name}: it is silent")
        step = 2 * self.hop  # of a speech token
        end = len(samples) // 3 // step * step
        try:
            reference = parts.s3gen.embed_ref(samples[:end], self.rate, device=parts.device)
            low = torch.from_numpy(resample(samples[end:], self.rate, LOW_RATE)).to(parts.device)
            tokens = parts.s3gen.tokenizer(low[None])[0].flatten()
        except Exception as error:
            raise Unusable(f"{name}: the model cannot encode it ({describe(error)})") from error
        voice = reference if parts.t3 is None else SimpleNamespace(gen=reference)
        draws = Draws(parts.device, int(generator.integers(2**62)))
        return Utterance(number, {}, voice, draws, tokens=tokens)

    def _write(self, number: int, mel: Tensor, samples: Tensor) -> None:
        count = min(mel.size(1), samples.size(0) // self.hop)
        with full_disk("write the teacher's data"):
            sound, frames = self._path(number, ".flac"), self._path(number, ".safetensors")
            hidden = [path.with_name(f".{path.name}") for path in (sound, frames)]
            try:
                every = samples[: count * self.hop].clamp(-1, 1).numpy()
                soundfile.write(hidden[0], every, self.rate, format="FLAC", subtype="PCM_24")
                save_file({"mel": mel[:, :count].contiguous()}, hidden[1])
            except (soundfile.SoundFileError, OSError) as error:
                for path in hidden:
                    path.unlink(missing_ok=True)
                raise OSError(str(error)) from error
            os.replace(hidden[0], sound)
            os.replace(hidden[1], frames)


class TeacherSegments:
    """Segments of a teacher's items, mel frames and samples cut at the same place.

    Args:
        numbers: of the items that are there.
        frames, held: mel frames of a segment, and of one that is validated on at most.
    """

    def __init__(self, folder: Path, numbers: list[int], seed: int, frames: int, hop: int, held: int):
        self._folder, self._seed, self._frames, self._hop, self._held = folder, seed, frames, hop, held
        self.names, self._validated = split([f"{number:06d}" for number in numbers], seed)

    def segment(self, number: int) -> Segment:
        """As ``segments.Source``; what is short is followed by silence."""
        epoch, place = divmod(number, len(self.names))
        generator = np.random.default_rng([self._seed, TRAINING, number])
        name = self.names[order(self._seed, epoch, len(self.names))[place]]
        mel, samples = self._cut(name, generator.random(), self._frames)
        missing = self._frames - mel.size(1)
        silence = float(mel.min()) if mel.numel() else 0.0
        mel = torch.nn.functional.pad(mel, (0, missing), value=silence)
        return Segment(torch.nn.functional.pad(samples, (0, missing * self._hop)), mel, name)

    def held_out(self) -> list[Segment]:
        """As ``segments.Source``."""
        return list(self._validation())

    def describe(self) -> str:
        """As ``segments.Source``."""
        told = read_json(self._folder / NAME)
        return f"{len(self.names):,} utterances of {told['model']}"

    def _validation(self) -> Iterator[Segment]:
        generator = np.random.default_rng([self._seed, VALIDATION])
        for name in self._validated:
            mel, samples = self._cut(name, generator.random(), self._held)
            yield Segment(samples, mel, name)

    def _cut(self, name: str, place: float, frames: int) -> tuple[Tensor, Tensor]:
        path = self._folder / name
        try:
            mel = load_file(path.with_suffix(".safetensors"))["mel"]
            start = int(place * (max(0, mel.size(1) - frames) + 1))
            mel = mel[:, start : start + frames].clone()
            with soundfile.SoundFile(path.with_suffix(".flac")) as sound:
                sound.seek(start * self._hop)
                samples = sound.read(mel.size(1) * self._hop, dtype="float32")
        except Exception as error:
            raise TrainingError(
                f"Item {name} of the teacher's data in {self._folder} cannot be read ({describe(error)}).",
                "",
                "Delete its files: the same command makes them again.",
            ) from error
        return mel, torch.from_numpy(samples)
