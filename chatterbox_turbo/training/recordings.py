"""A folder of recordings: which files there are, and a part of one of them, read without the rest.

Files are listed by name alone, so that ten thousand are found in a moment; a header is read when its file's turn comes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from ..errors import LONG, TrainingError, brief, describe
from ..runtime.voice.reference_audio import resample

LOWEST_RATE = 16_000  # Hz: below, the upper bands of 8 kHz mel frames are empty
QUIETEST = 1e-3  # peak (-60 dB): what is below teaches nothing
MARGIN = 0.01  # seconds read on either side for the resampler
# RAW has no header to read
SUFFIXES = frozenset(f".{name.lower()}" for name in soundfile.available_formats()) - {".raw"} | {
    ".aif", ".aifc", ".oga", ".opus", ".mp2", ".wave", ".snd", ".sph",
}  # fmt: skip


class Unusable(ValueError):
    """A file that no segment can be taken from; the message says why."""


@dataclass(frozen=True)
class Recordings:
    """Paths below a folder, with slashes, sorted."""

    folder: Path
    names: tuple[str, ...]

    def read(self, name: str, place: float, count: int, rate: int) -> np.ndarray:
        """At most ``count`` samples (n,) float32 at ``rate`` Hz, channels averaged; no more of the file is read.

        Args:
            place: where among all places, 0 to 1.

        Raises:
            Unusable: it is no audio, too low in rate, empty, or holds values that are not finite.
            TrainingError: the file is gone.
        """
        path = self.folder / name
        try:
            # soundfile encodes text strictly, and a name from another system need not be text
            with soundfile.SoundFile(os.fsencode(path) if os.name == "posix" else path) as sound:
                own = sound.samplerate
                if own < LOWEST_RATE:
                    raise Unusable(f"{own} Hz: below {LOWEST_RATE}, half of the mel bands are empty")
                if not sound.frames:
                    raise Unusable("it has no samples")
                needed = math.ceil(count * own / rate)
                start = int(place * (max(0, sound.frames - needed) + 1))
                before = min(start, int(MARGIN * own)) if own != rate else 0
                after = int(MARGIN * own) if own != rate else 0
                sound.seek(start - before)
                samples = sound.read(before + needed + after, dtype="float32", always_2d=True).mean(axis=1)
        except FileNotFoundError as error:
            raise _gone(path) from error
        except (soundfile.SoundFileError, OSError) as error:
            if not path.exists():  # libsndfile says only that it cannot open it
                raise _gone(path) from error
            raise Unusable(f"it cannot be decoded ({describe(error)})") from error
        if not np.isfinite(samples).all():
            raise Unusable("it has samples that are not finite numbers")
        cut = round(before * rate / own)
        return resample(samples, own, rate)[cut : cut + count]


def _gone(path: Path) -> TrainingError:
    return TrainingError(
        f"{brief(str(path), LONG)} is gone.",
        "Without it the run would go on with other data.",
        "Put it back, or begin another run.",
    )


def find(folder: Path) -> Recordings:
    """All files of a folder, and of those in it, that are called like audio.

    Raises:
        TrainingError: there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise TrainingError(f"There is no folder {brief(str(folder), LONG)}.", "", "Name one with recordings.")
    names, others = [], set()
    for root, folders, files in os.walk(folder):
        folders.sort()
        for file in files:
            suffix = os.path.splitext(file)[1].lower()
            if suffix in SUFFIXES:
                names.append((Path(root) / file).relative_to(folder).as_posix())
            else:
                others.add(suffix or "no suffix")
    if not names:
        raise TrainingError(
            f"There are no recordings in {brief(str(folder), LONG)}.",
            f"Its files are {', '.join(sorted(others)[:8])}." if others else "It is empty.",
            "What soundfile reads is used: WAV, FLAC, MP3, Ogg, Opus and others; convert m4a and aac first.",
        )
    return Recordings(folder, tuple(sorted(names)))
