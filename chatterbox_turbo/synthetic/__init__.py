"""Real upstream models with seeded random weights, for tests, demos and benchmarks without a checkpoint."""

from pathlib import Path

from .architecture import SIZES, architecture
from .checkpoint import FAMILIES, build, save

__all__ = ["FAMILIES", "SIZES", "architecture", "build", "reference_voice", "save"]


def reference_voice() -> Path:
    """Path of the bundled reference recording: 24 kHz mono FLAC, about 11 s of espeak-ng speech."""
    return Path(__file__).parent.parent / "assets" / "reference_voice.flac"
