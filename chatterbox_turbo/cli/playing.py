"""``say --stream``: blocks to the sound card, to standard output or to a file while they are made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .screen import Screen

if TYPE_CHECKING:
    from ..speech.stream import SpeechStream, StreamMetrics

Sink = Callable[[Any], None]


def check_sink(output: Path | None) -> str:
    """Where a stream goes: ``file``, ``pcm`` (standard output) or ``card``.

    Raises:
        typer.BadParameter: there is no sound card, and standard output is a terminal.
    """
    if output is not None:
        return "pcm" if str(output) == "-" else "file"
    reason = why_no_card()
    if not reason:
        return "card"
    if sys.stdout.isatty():
        raise typer.BadParameter(
            f"--stream cannot play here: {reason}. Give -o FILE, or pipe it: "
            "chatterbox-turbo say --stream TEXT | aplay -f S16_LE -r 24000"
        )
    return "pcm"


def why_no_card() -> str:
    """Why nothing can be played here; empty where it can."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: no PortAudio library
        return f"{'no sound library' if isinstance(error, OSError) else 'pip install sounddevice'} ({error})"
    try:
        sounddevice.check_output_settings(channels=1, dtype="float32", samplerate=24_000)
    except Exception as error:  # PortAudioError, ValueError: whatever the system says
        return f"no sound card ({error})"
    return ""


@contextmanager
def sink_of(kind: str, output: Path | None, rate: int) -> Iterator[Sink]:
    """A function that takes samples (m,) float32."""
    if kind == "pcm":
        raw = sys.__stdout__.buffer
        yield lambda samples: (raw.write(pcm(samples)), raw.flush())
    elif kind == "file":
        import soundfile

        with soundfile.SoundFile(output, "w", rate, 1) as file:
            yield file.write
    else:
        import sounddevice

        with sounddevice.OutputStream(rate, channels=1, dtype="float32") as card:
            yield lambda samples: card.write(samples[:, None])


def pcm(samples: Any) -> bytes:
    """Samples (m,) as 16-bit little-endian."""
    return (samples.clip(-1.0, 1.0) * 32767.0).round().astype("<i2").tobytes()


def play(stream: SpeechStream, kind: str, output: Path | None, rate: int) -> tuple[StreamMetrics | None, float]:
    """All blocks of a stream, each as it comes; the last one's metrics and the smallest lead."""
    last, lead = None, float("inf")
    with stream, sink_of(kind, output, rate) as take:
        for samples, last in stream:
            take(samples[0].numpy())
            lead = min(lead, last.lead)
    return last, lead


def tell(screen: Screen, metrics: StreamMetrics | None, lead: float, where: str) -> None:
    """One line about a stream, on standard error: standard output may be the speech."""
    if metrics is None:
        screen.note("no speech")
        return
    dry = f", {-lead:.2f} s behind at worst" if lead < 0 else ""
    screen.note(
        f"{where}: {metrics.seconds:.2f} s of speech in {metrics.chunk + 1} blocks, the first after "
        f"{metrics.first_audio:.2f} s, {metrics.real_time_factor:.2f}x real time{dry}"
    )
