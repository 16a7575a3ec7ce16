"""Work done at ``apply``, so that the first request does not pay for it."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch

from ..errors import SpeechTruncatedWarning
from ..upstream import warmup as upstream
from .base import Context, Pass

SECONDS = 6  # Turbo refuses reference voices of 5 s and less
TOKENS = 12


class WarmupPass(Pass):
    """Runs upstream's own entry points once; leaves the voice and the random generators as they were.

    ``light``: a few tokens and their audio with the voice that is loaded. ``full``: before that, a reference
    voice is encoded, which without the conditioning pass is where numba compiles librosa's functions.
    """

    name = "warmup"
    summary = "first-call costs paid at apply"

    def check(self, context: Context) -> str:
        if context.config.warmup.level == "light" and context.parts.voice is None:
            return "the model has no voice yet; use level full, which brings its own"
        return ""

    def apply(self, context: Context) -> str:
        parts, level = context.parts, context.config.warmup.level
        attribute = upstream.voice_attribute(parts)
        voice = parts.voice
        devices = [parts.device] if parts.device.type == "cuda" else []
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore", SpeechTruncatedWarning)
            try:
                setattr(parts.model, attribute, upstream.copy_voice(voice))
                if level == "full":
                    upstream.prepare_voice(parts, upstream.write_tone(Path(folder) / "tone.wav", SECONDS))
                # upstream's Llama loop would leave a submodule and hooks behind, and has nothing to warm up
                upstream.speak(parts, TOKENS, with_t3="decoding" in context.applied)
            finally:  # not journalled: nothing of it outlives this call
                setattr(parts.model, attribute, voice)
                if context.voices is not None:
                    context.voices.clear()
        return f"level {level}"
