"""What the tests of training share: recordings and a run of a few steps. By itself: a process that is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import soundfile
import torchaudio

from chatterbox_turbo.runtime.s3gen.vocos_network import MelDescription
from chatterbox_turbo.runtime.voice.features import MelSpectrogram
from chatterbox_turbo.training import state
from chatterbox_turbo.training.recordings import find
from chatterbox_turbo.training.segments import RecordedSegments
from chatterbox_turbo.training.settings import TrainingSettings
from chatterbox_turbo.training.trainer import train

MEL = MelDescription(24000, 80, 480, 1920, 1920, 0.0, 8000.0)
SETTINGS = TrainingSettings(
    steps=4, batch=2, frames=8, dim=16, intermediate_dim=24, layers=1, discriminator_width=1 / 16, mel_only_steps=1,
    validate_every=2, save_every=1,
)  # fmt: skip


def mel_function():
    """The same frames as upstream's function, without importing upstream (``test_training_data`` compares the two)."""
    basis = torchaudio.functional.melscale_fbanks(961, 0.0, 8000.0, 80, 24000, "slaney", "slaney").T
    return MelSpectrogram(basis.numpy(), 1920, 480)


def voiced(seconds: float, rate: int = 24000, pitch: float = 120.0) -> np.ndarray:
    """Samples (n,) float32 like a vowel that comes and goes."""
    at = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * k * at) / k for k in range(1, 12))
    noise = np.random.default_rng(int(pitch)).standard_normal(len(at))
    return (0.15 * wave * (0.6 + 0.4 * np.sin(9 * at)) + 0.004 * noise).astype(np.float32)


def write_recordings(folder: Path, count: int = 4, seconds: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        soundfile.write(folder / f"{number}.wav", voiced(seconds, pitch=100 + 25 * number), 24000)
    return folder


def source(folder: Path, settings: TrainingSettings = SETTINGS) -> RecordedSegments:
    return RecordedSegments(find(folder), settings.seed, settings.frames * MEL.hop, 24000, MEL.hop, 12000)


def run(audio: Path, out: Path, settings: TrainingSettings = SETTINGS, **options):
    return train(out, source(audio, settings), settings, (mel_function(), MEL), **options)


def killed(audio: Path, out: Path, write: int) -> None:
    """A run whose process dies while it writes for the ``write``th time, with nothing closed or cleaned up."""
    own, left = state.TensorFile.write, [write]

    def dying(self, *arguments):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        own(self, *arguments)

    state.TensorFile.write = dying
    run(audio, out)


if __name__ == "__main__":
    killed(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
