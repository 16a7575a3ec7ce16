"""Segments to train on, each a function of the seed and its number: where a run is in its data is a number.

Every number draws its file, its place and its gain by a generator of its own, so that whoever asks, in which order, on
however many processes, gets the same.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import TrainingError, TurboError
from .recordings import QUIETEST, Recordings, Unusable

PLACES, FILES = 4, 200  # tries in a file for one that is not silent, and files for one segment
HELD_OUT, HELD_SHARE = 16, 20  # files kept for validation at most, and of how many one
PEAKS = (-6.0, -1.0)  # dB of a segment's loudest sample, as Vocos trains
LOUDEST_GAIN = 10.0  # 20 dB: what is quiet does not become noise
VALIDATION, TRAINING, ORDER = 1, 2, 3  # streams of random numbers of one seed


@dataclass(frozen=True)
class Segment:
    """A stretch of sound.

    Attributes:
        samples: (n,) fp32.
        mel: (bands, n / hop) fp32, or ``None``: of the samples.
        name: where it is from.
        left_out: names of files that came up before and were of no use, with the reasons.
    """

    samples: Tensor
    mel: Tensor | None = None
    name: str = ""
    left_out: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Where segments come from."""

    def segment(self, number: int) -> Segment:
        """The segment of a number from 0 on, without an end."""

    def held_out(self) -> list[Segment]:
        """Those that are validated on and never trained on."""

    def describe(self) -> str:
        """What it is, for the checkpoint's description."""


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation (count,) of files for an epoch."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def split(names: Sequence[str], seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names to train on and names to validate on, by the seed; one file is both."""
    if len(names) == 1:
        return tuple(names), tuple(names)
    held = {names[i] for i in order(seed, -1 % 2**32, len(names))[: min(HELD_OUT, max(1, len(names) // HELD_SHARE))]}
    return tuple(n for n in names if n not in held), tuple(n for n in names if n in held)


class RecordedSegments:
    """Segments of recordings; their mel frames are computed where they are needed.

    Args:
        count: samples of a segment.
        hop: what the number of samples is a multiple of.
        held: samples of a segment that is validated on, at most.
    """

    def __init__(self, recordings: Recordings, seed: int, count: int, rate: int, hop: int, held: int):
        self._recordings, self._seed, self._count, self._rate, self._hop = recordings, seed, count, rate, hop
        self.names, self._validated = split(recordings.names, seed)
        self._held = held - held % hop

    def segment(self, number: int) -> Segment:
        """As ``Source``; short files are followed by silence.

        Raises:
            TrainingError: no file that comes up is of use, or one is gone.
        """
        epoch, place = divmod(number, len(self.names))
        generator = np.random.default_rng([self._seed, TRAINING, number])
        name, left_out = self.names[order(self._seed, epoch, len(self.names))[place]], {}
        for _ in range(FILES):
            try:
                samples = self._sounding(name, generator, self._count)
            except Unusable as error:
                left_out[name] = str(error)
                name = self.names[generator.integers(len(self.names))]
                continue
            peak = 10 ** (generator.uniform(*PEAKS) / 20)
            samples *= min(LOUDEST_GAIN, peak / float(np.abs(samples).max()))
            samples = np.pad(samples, (0, self._count - len(samples)))
            return Segment(torch.from_numpy(samples), None, name, left_out)
        raise nothing_to_hear(self._recordings, left_out)

    def held_out(self, count: int = HELD_OUT) -> list[Segment]:
        """As ``Source``: one segment of each file that is held out, as it is, cut to whole mel frames.

        Raises:
            TrainingError: none is of use, and neither is any other file.
        """
        found, left_out = [], {}
        generator = np.random.default_rng([self._seed, VALIDATION])
        # where every file that was held out is of no use, the first that is
        for number, name in enumerate((*self._validated, *self.names)):
            if len(found) == count or (number >= len(self._validated) and found):
                break
            try:
                samples = self._sounding(name, generator, self._held)
                samples = samples[: len(samples) - len(samples) % self._hop]
                if len(samples) < 3 * self._hop:
                    raise Unusable(f"{len(samples) / self._rate:.2f} s are too short")
            except Unusable as error:
                left_out[name] = str(error)
                continue
            found.append(Segment(torch.from_numpy(np.ascontiguousarray(samples)), None, name, dict(left_out)))
        if not found:
            raise nothing_to_hear(self._recordings, left_out)
        return found

    def describe(self) -> str:
        """As ``Source``."""
        return f"{len(self.names):,} recordings"

    def _sounding(self, name: str, generator: np.random.Generator, count: int) -> np.ndarray:
        for _ in range(PLACES):
            samples = self._recordings.read(name, generator.random(), count, self._rate)
            if samples.size and np.abs(samples).max() >= QUIETEST:
                return samples
        raise Unusable(f"it is silent at {PLACES} places")


def chosen(
    recordings: Recordings, count: int, longest: int, rate: int, hop: int
) -> tuple[list[np.ndarray], dict[str, str]]:
    """Samples (n,) of whole mel frames of the first ``count`` recordings of use, and why others were left out.

    Raises:
        TrainingError: none is of use.
    """
    every = RecordedSegments(recordings, 0, longest, rate, hop, longest)
    every._validated = recordings.names
    segments = every.held_out(count)
    left_out = {name: reason for segment in segments for name, reason in segment.left_out.items()}
    return [segment.samples.numpy() for segment in segments], left_out


def nothing_to_hear(recordings: Recordings, left_out: dict[str, str]) -> TrainingError:
    """The error for recordings that are of no use."""
    some = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:4])
    return TrainingError(
        f"No recording in {recordings.folder} can be trained on ({len(left_out):,} were tried).",
        f"{some}{'; and so on' if len(left_out) > 4 else ''}.",
        "Give recordings of speech of 16 kHz and up.",
    )


@dataclass(frozen=True)
class Batch:
    """Segments of one step and process: samples (B, n), mel frames (B, bands, T) or ``None``, names, files left out."""

    samples: Tensor
    mel: Tensor | None
    names: tuple[str, ...]
    left_out: dict[str, str]


class Batches(Dataset):
    """The batch of a step, counted from 0, for one process of several.

    Args:
        batch: segments a step, over all processes.
    """

    def __init__(self, source: Source, batch: int, process: int = 0, processes: int = 1):
        self._source, self._batch = source, batch
        self._rows = range(process, batch, processes)

    def __getitem__(self, step: int) -> Batch | TurboError:
        """An error is returned: one that a worker raises arrives with its traceback as its message."""
        try:
            return self._batch_of(step)
        except TurboError as error:
            return error

    def _batch_of(self, step: int) -> Batch:
        segments = [self._source.segment(step * self._batch + row) for row in self._rows]
        mels = [segment.mel for segment in segments]
        left_out = {name: reason for segment in segments for name, reason in segment.left_out.items()}
        return Batch(
            torch.stack([segment.samples for segment in segments]),
            None if mels[0] is None else torch.stack(mels),
            tuple(segment.name for segment in segments),
            left_out,
        )


def batches(dataset: Batches, start: int, end: int, workers: int) -> Iterator[Batch]:
    """The batches of steps ``start`` to ``end``, prepared ahead by ``workers`` processes, two each.

    Raises:
        TurboError: as the source's ``segment``.
    """
    from torch.utils.data import DataLoader

    options: dict[str, Any] = {"prefetch_factor": 2, "worker_init_fn": _outlive_a_signal} if workers else {}
    # its own generator: the loader draws a seed for its workers, of which nothing here depends
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        dataset, batch_size=None, sampler=range(start, end), num_workers=workers, generator=generator, **options
    )
    for batch in loader:
        if isinstance(batch, TurboError):
            raise batch
        yield batch


def _outlive_a_signal(worker: int) -> None:
    """A worker's own handlers: the first signal is passed over, and the second ends it, as in ``cli.vocoder``.

    Terminals and process managers send theirs to the whole group. The run ends after its step then, which may still
    wait for this worker. Two are not passed over, so that the loader can end a worker that does not end by itself.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def once(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    for each in numbers:
        signal.signal(each, once)
