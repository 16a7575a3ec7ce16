"""The recording that synthetic voices are made of."""

from pathlib import Path


def reference_voice() -> Path:
    """Path of the bundled reference recording: 24 kHz mono FLAC, about 11 s of espeak-ng speech."""
    return Path(__file__).parent.parent / "assets" / "reference_voice.flac"
