"""Samples to the bytes of an audio format, at once or as they come."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import soundfile

from ..speech.files import as_16_bit

# by OpenAI's name: container and coding as soundfile calls them (none: bare samples), and the type of the content
FORMATS: dict[str, tuple[str, str, str]] = {
    "mp3": ("MP3", "MPEG_LAYER_III", "audio/mpeg"),
    "opus": ("OGG", "OPUS", "audio/ogg"),
    "flac": ("FLAC", "PCM_16", "audio/flac"),
    "wav": ("WAV", "PCM_16", "audio/wav"),
    "pcm": ("", "", "audio/pcm"),
}
UNKNOWN = 0xFFFFFFFF  # of a WAV stream's length: players read to the end
# constant, because one that varies needs a header that is written last
_OPTIONS: dict[str, dict[str, Any]] = {"mp3": {"bitrate_mode": "CONSTANT", "compression_level": 0.5}}


def available() -> list[str]:
    """Names of the formats that this libsndfile writes."""
    return [name for name, (container, coding, _) in FORMATS.items() if _writable(container, coding)]


def _writable(container: str, coding: str) -> bool:
    return not container or (container in soundfile.available_formats() and soundfile.check_format(container, coding))


def content_type(name: str) -> str:
    """Of a format."""
    return FORMATS[name][2]


def whole(name: str, samples: np.ndarray, rate: int) -> bytes:
    """A complete file of samples (n,) float32, mono, at ``rate`` Hz."""
    if name == "pcm":
        return _pcm(samples)
    container, coding, _ = FORMATS[name]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, coding, format=container, **_OPTIONS.get(name, {})) as sound:
        sound.write(as_16_bit(samples))
    return file.getvalue()


class Encoder:
    """A format's bytes as samples come: what has been given away is not written again, lengths in headers included.

    WAV and FLAC say that their length is not known.
    """

    def __init__(self, name: str, rate: int):
        container, coding, _ = FORMATS[name]
        self._rate, self._first = rate, True
        self._bare = name in ("pcm", "wav")
        self._wav = name == "wav"
        self._sink = _Sink()
        self._sound: soundfile.SoundFile | None = None
        if not self._bare:
            options = _OPTIONS.get(name, {})
            self._sound = soundfile.SoundFile(self._sink, "w", rate, 1, coding, format=container, **options)

    def push(self, samples: np.ndarray) -> bytes:
        """Bytes that samples (m,) float32 make complete."""
        if self._sound is not None:
            self._sound.write(as_16_bit(samples))
            return self._sink.take()
        header = _wav_header(self._rate) if self._wav and self._first else b""
        self._first = False
        return header + _pcm(samples)

    def finish(self) -> bytes:
        """What is left."""
        if self._sound is None:
            return b""
        self._sound.close()
        return self._sink.take()

    def close(self) -> None:
        """Let go of the encoder; nothing more is wanted."""
        if self._sound is not None:
            self._sound.close()


class _Sink:
    """A file for libsndfile that keeps what is appended until it is taken, and forgets what is written over."""

    def __init__(self) -> None:
        self._fresh, self._end, self._at = bytearray(), 0, 0

    def write(self, data: Any) -> int:
        data = bytes(data)
        new = data[max(0, self._end - self._at) :]
        self._fresh += new
        self._end += len(new)
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def take(self) -> bytes:
        data = bytes(self._fresh)
        self._fresh.clear()
        return data


def _pcm(samples: np.ndarray) -> bytes:
    return as_16_bit(samples).astype("<i2").tobytes()


def _wav_header(rate: int) -> bytes:
    kind = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", UNKNOWN, b"WAVE") + kind + struct.pack("<4sI", b"data", UNKNOWN)
