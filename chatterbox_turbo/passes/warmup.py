"""Work done at ``apply``, so that the first request does not pay for it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from ..runtime.device import random_state
from ..upstream import warmup as upstream
from .base import Context, Pass, in_force
from .token_requests import untold

SECONDS = 6  # Turbo refuses reference voices of 5 s and less
TOKENS = 12


class WarmupPass(Pass):
    """Runs upstream's own entry points once; leaves the voice and the random generators as they were.

    ``light``: a few tokens and their audio with the voice that is loaded, and on CUDA T3's graphs for a call of any
    length. ``full``: before that, a reference voice is encoded, which without the conditioning pass is where numba
    compiles librosa's functions; and on CUDA T3's graphs that streams begin with are captured, for each number of
    them. What flow matching and vocoder capture for the first window of a stream follows once there are streams
    (``speech.stream.warm_up``).
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
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(random_state.kept(parts.device))
            stack.enter_context(in_force(context.settings))
            stack.enter_context(untold())  # it is cut on purpose
            try:
                setattr(parts.model, attribute, upstream.copy_voice(voice))
                if level == "full":
                    upstream.prepare_voice(parts, upstream.write_tone(Path(folder) / "tone.wav", SECONDS))
                # upstream's Llama loop would leave a submodule and hooks behind, and has nothing to warm up
                upstream.speak(parts, TOKENS, with_t3="decoding" in context.applied)
                if context.engines.token_model is not None:
                    _capture(context, streams=level == "full")
            finally:  # not journalled: nothing of it outlives this call
                setattr(parts.model, attribute, voice)
                if context.voices is not None:
                    context.voices.clear()
        return f"level {level}"


class _Reached(BaseException):
    """Leaves ``generate`` where it calls T3."""


def _capture(context: Context, streams: bool) -> None:
    """Have T3's graphs for what ``generate`` asks it for by its own defaults; ``streams``: and those of streams."""
    engine, requests = context.engines.token_model, []

    def keep(*args: Any, **kwargs: Any) -> None:
        requests.append(engine.request(*args, **kwargs))
        raise _Reached

    with engine.calls.diverted(keep), suppress(_Reached), torch.inference_mode():
        context.parts.model.generate(**upstream.request(context.parts))
    for request in requests:
        if streams:
            engine.capture_streams(request)
        engine.capture(request)
