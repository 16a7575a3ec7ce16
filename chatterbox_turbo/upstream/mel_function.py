"""Upstream's own mel spectrogram of 24 kHz audio without a model, for what a vocoder is trained and measured by."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

from torch import Tensor

from ..errors import ModelUnavailableError, describe
from ..runtime.s3gen.vocos_network import MelDescription
from . import mel_frames

MelFunction = Callable[[Tensor], Tensor]


def mel_function() -> tuple[MelFunction, MelDescription]:
    """What ``S3Gen`` calls ``mel_extractor``, samples (B, n) fp32 to (B, 80, n / 480), and what its frames are.

    Raises:
        ModelUnavailableError: chatterbox-tts cannot be imported, or its function is not a known one.
    """
    try:
        function = import_module("chatterbox.models.s3gen.utils.mel").mel_spectrogram
    except Exception as error:  # upstream imports half of the world
        raise ModelUnavailableError(
            f"chatterbox-tts cannot be imported ({describe(error)}).",
            "Its mel spectrogram is what a vocoder is trained on.",
            "chatterbox-turbo doctor says more.",
        ) from error
    description = mel_frames.describe(SimpleNamespace(mel_extractor=function))
    if description is None:
        raise ModelUnavailableError(
            "The mel spectrogram of the installed chatterbox-tts is not a known one.",
            "A checkpoint must say which frames it was trained on.",
            "Install a release that docs/versions.md names.",
        )
    return function, description
