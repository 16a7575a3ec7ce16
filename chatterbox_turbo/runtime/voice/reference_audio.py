"""Reference audio read and measured as librosa does it, to the bit, without the parts of librosa that numba compiles.

librosa compiles a dozen functions with numba when its utilities are first imported: 8 s where no compiled ones are on
disk yet, as in a container. What a voice needs of it is a few lines of NumPy.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch

from ...errors import LONG, ReferenceAudioError, ReferenceAudioMissingError, brief, describe
from . import unreadable

FRAME, HOP = 2048, 512  # of librosa.effects.trim
FLOOR = 1e-5  # amplitude below which librosa takes everything for silence
BLOCK = 4096  # frames at once: bounds the memory of a long recording

Resampler = Callable[[np.ndarray, int, int], np.ndarray]


@dataclass(frozen=True)
class Reference:
    """A recording in memory: the digest of its content, and what decodes to samples."""

    digest: bytes
    name: str
    source: Any  # the bytes of a file, or (samples, rate)
    path: Path | None = None

    @classmethod
    def open(cls, file: Any) -> Reference:
        """Read whatever ``librosa.load`` takes: a path, a binary file (from where it stands), a ``SoundFile``.

        Raises:
            ReferenceAudioMissingError: there is no such file.
            ReferenceAudioError: it cannot be read; the message says what was given, not its content.
        """
        unreadable.refuse(file)
        try:
            if isinstance(file, (str, bytes, os.PathLike)):
                path = Path(os.fsdecode(file))
                data = path.read_bytes()
                return cls(hashlib.sha256(data).digest(), brief(str(path), LONG), data, path)
            if hasattr(file, "read") and not isinstance(file, soundfile.SoundFile):
                data = _all_of(file)
                return cls(hashlib.sha256(data).digest(), f"(a {type(file).__name__})", data)
            return cls._decoded(file)
        except FileNotFoundError:
            if isinstance(file, str) and unreadable.is_no_path(file):
                raise unreadable.error_for(file) from None
            raise ReferenceAudioMissingError(
                f"There is no reference audio {brief(str(path), LONG)}.",
                "",
                "Check the path; a temporary file may be gone.",
            ) from None
        except OSError as error:
            raise unreadable.error_for(file, error.strerror or type(error).__name__) from None
        except (TypeError, ValueError, soundfile.SoundFileError) as error:
            raise unreadable.error_for(file, describe(error)) from None

    @classmethod
    def _decoded(cls, file: Any) -> Reference:
        """A ``SoundFile`` or a file descriptor, known by its samples."""
        sound = file if isinstance(file, soundfile.SoundFile) else soundfile.SoundFile(file)
        samples, rate = _read(sound)
        digest = hashlib.sha256(repr((rate, samples.shape)).encode() + samples.tobytes()).digest()
        return cls(digest, f"(a {type(file).__name__})", (samples, rate))

    def samples(self, rate: int, resample: Resampler) -> np.ndarray:
        """Mono samples (n,) float32 at ``rate`` Hz, as ``librosa.load(file, sr=rate)`` gives them.

        Raises:
            ReferenceAudioError: it is not audio, has no samples, or holds values that are not finite.
        """
        samples, own = self.source if isinstance(self.source, tuple) else self._decode()
        if not samples.size:
            raise ReferenceAudioError(f"The reference audio {self.name} has no samples.", "", "Record it again.")
        if not np.isfinite(samples).all():
            raise ReferenceAudioError(
                f"The reference audio {self.name} has samples that are not finite numbers (NaN or infinity).",
                "Whatever wrote it divided by zero or overflowed.",
                "Write it again, as 16-bit PCM for instance.",
            )
        if samples.ndim > 1:
            samples = np.mean(samples, axis=0)
        return resample(samples, own, rate)

    def _decode(self) -> tuple[np.ndarray, int]:
        try:
            return _read(soundfile.SoundFile(io.BytesIO(self.source)))
        except soundfile.SoundFileError as error:
            if self.path is not None:
                decoded = _read_by_backend(self.path)
                if decoded is not None:
                    return decoded
            raise ReferenceAudioError(
                f"The reference audio {self.name} is not audio that can be decoded.",
                f"libsndfile says: {error}",
                "Convert it to WAV or FLAC; other formats (m4a, aac) need ffmpeg installed and a path.",
            ) from error


def _all_of(file: Any) -> bytes:
    data = file.read()
    if inspect.isawaitable(data):
        if inspect.iscoroutine(data):
            data.close()
        raise TypeError("its read is asynchronous; pass the file below it (UploadFile.file)")
    if isinstance(data, str):
        raise TypeError("it is opened in text mode")
    if not data and hasattr(file, "seek"):  # read before
        file.seek(0)
        data = file.read()
    return data if isinstance(data, bytes) else bytes(data)


def _read(sound: soundfile.SoundFile) -> tuple[np.ndarray, int]:
    """Samples (n,) or (channels, n) float32, and their rate in Hz; closes the file."""
    with sound:
        return sound.read(dtype="float32", always_2d=False).T, sound.samplerate


def _read_by_backend(path: Path) -> tuple[np.ndarray, int] | None:
    """What librosa falls back to: ffmpeg or a system library by audioread, 16 bits; ``None`` where none can."""
    try:
        import audioread

        with audioread.audio_open(str(path)) as sound:
            pcm, rate, channels = b"".join(sound), sound.samplerate, sound.channels
    except (ImportError, OSError, EOFError, audioread.DecodeError):
        return None
    samples = np.frombuffer(pcm, "<i2").astype(np.float32) * (1 / 32768)
    return (samples.reshape(-1, channels).T if channels > 1 else samples), rate


def resample(samples: np.ndarray, source: int, target: int) -> np.ndarray:
    """Samples (n,) float32 from one rate in Hz to another, as ``librosa.resample`` does by default (soxr, HQ)."""
    if source == target:
        return samples
    wanted = int(np.ceil(samples.shape[-1] * (float(target) / source)))
    result = soxr.resample(samples, source, target, quality="soxr_hq")[:wanted]
    return np.pad(result, (0, wanted - len(result))).astype(samples.dtype, copy=False)


def resample_on(device: Any) -> Resampler:
    """torchaudio's resampler on a device, with its default filter: another filter, so other samples (33 dB)."""
    import torchaudio

    def by_torchaudio(samples: np.ndarray, source: int, target: int) -> np.ndarray:
        if source == target:
            return samples
        waves = torch.from_numpy(np.ascontiguousarray(samples))
        waves = (waves.float() if torch.device(device).type == "mps" else waves).to(device)  # which has no float64
        return torchaudio.functional.resample(waves, source, target).cpu().numpy()

    return by_torchaudio


def trim(samples: np.ndarray, below_db: float) -> np.ndarray:
    """Samples (n,) without what is ``below_db`` quieter than the loudest frame, at both ends (librosa.effects.trim)."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, FRAME // 2), FRAME)[::HOP]
    level = np.sqrt(np.mean(np.square(frames), axis=-1))
    loudest = np.max(level)
    db = 10.0 * np.log10(np.maximum(FLOOR**2, np.square(level)))
    db -= 10.0 * np.log10(np.maximum(FLOOR**2, loudest**2))
    loud = np.flatnonzero(db > -below_db)
    return samples[loud[0] * HOP : (loud[-1] + 1) * HOP] if loud.size else samples[:0]


def mel_power(samples: np.ndarray, basis: np.ndarray, window: np.ndarray, hop: int) -> np.ndarray:
    """Mel power spectrogram (t, m) float32 of samples (n,) float32, in centred frames with reflected ends.

    Args:
        basis: mel filters (m, 1 + w/2) float32.
        window: (w,) float64; frames are multiplied and transformed in its precision and rounded after, as librosa does.
    """
    from scipy.fft import rfft  # librosa's; NumPy's rounds differently

    width = len(window)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, width // 2, mode="reflect"), width)[::hop].T
    spectrum = np.zeros((1 + width // 2, frames.shape[1]), dtype=np.complex64, order="F")
    for start in range(0, frames.shape[1], BLOCK):
        spectrum[:, start : start + BLOCK] = rfft(window[:, None] * frames[:, start : start + BLOCK], axis=0)
    power = np.abs(spectrum)
    power **= 2.0
    return np.dot(basis, power).T
