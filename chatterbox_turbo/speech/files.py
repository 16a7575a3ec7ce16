"""Files that appear whole or not at all, and audio that is written into one block by block."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from ..errors import InvalidRequestError, TurboError, brief

FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".opus": ("OGG", "OPUS"),
    ".ogg": ("OGG", "OPUS"),
}
LARGEST_WAV = 2**31 - 2**20  # samples of 16 bits: a WAV file of 4 GB; RF64 goes on from there
KEPT = "Make room, and do the same again: what is finished is kept."


def audio_format(path: Path) -> tuple[str, str]:
    """Container and coding of an audio file, as soundfile calls them.

    Raises:
        InvalidRequestError: no such format, or this libsndfile cannot write it.
    """
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        raise InvalidRequestError(
            f"Unknown audio format {brief(path.suffix)} of {path}.", "", f"Use {', '.join(FORMATS)}."
        )
    if not soundfile.check_format(*known):
        version = soundfile.__libsndfile_version__
        raise InvalidRequestError(
            f"libsndfile {version} cannot write {known[1]}.", "", "Run pip install -U soundfile, or use .flac."
        )
    return known


def as_16_bit(samples: np.ndarray) -> np.ndarray:
    """Samples (n,) float32 as int16, those beyond full scale at full scale."""
    return np.rint(np.clip(samples, -1.0, 1.0) * 32767).astype(np.int16)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` once the body is done; until then it has another name.

    Raises:
        TurboError: it cannot be written. ``path`` is what it was, as it is after any error of the body.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise TurboError(f"{path} cannot be written: {error.strerror or error}.", "", KEPT) from error
        raise


def write_json(path: Path, data: Any) -> None:
    """As a whole or not at all."""
    with written(path) as file:
        file.write(json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n")


def write_piece(path: Path, samples: np.ndarray, rate: int) -> None:
    """Samples (n,) int16 as a WAV file, by Python alone: what fails says why."""
    with written(path) as file, wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.astype("<i2").tobytes())


def read_piece(path: Path) -> np.ndarray:
    """Samples (n,) int16 of what ``write_piece`` has written.

    Raises:
        TurboError: it is gone or damaged.
    """
    try:
        with wave.open(str(path), "rb") as sound:
            return np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.int16)
    except (OSError, wave.Error, EOFError) as error:
        raise TurboError(f"{path} cannot be read: {error}.", "", "Delete it; it is made again.") from error


class _Sink:
    """A file for libsndfile, which cannot be told of an error: the first one is kept."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def _tried(self, function: Callable[..., int], *arguments: Any) -> int:
        try:
            return function(*arguments)
        except OSError as error:
            self.error = self.error or error
            return 0

    def write(self, data: bytes) -> int:
        return self._tried(self._file.write, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._tried(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._tried(self._file.tell)


@contextmanager
def audio_written(path: Path, rate: int, count: int = 0) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes blocks (n,) int16 or float32, mono, of a file that appears when the body is done.

    Args:
        count: samples that there will be, where they may be more than a WAV file holds.

    Raises:
        InvalidRequestError: as ``audio_format``.
        TurboError: it cannot be written; ``path`` is what it was.
    """
    container, coding = audio_format(path)
    if container == "WAV" and count > LARGEST_WAV:
        container = "RF64"
    with written(path) as file, ThreadPoolExecutor(1) as thread:  # an interrupt would be lost in libsndfile's callbacks
        sink = _Sink(file)

        def done(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            try:
                result = thread.submit(function, *arguments, **options).result()
            except (soundfile.SoundFileError, AssertionError) as error:
                raise sink.error or OSError(f"libsndfile: {error}") from error
            if sink.error is not None:
                raise sink.error
            return result

        sound = done(soundfile.SoundFile, sink, "w", rate, 1, coding, format=container)
        try:
            yield lambda block: done(sound.write, block)
        except BaseException:
            with suppress(OSError):
                done(sound.close)
            raise
        done(sound.close)
