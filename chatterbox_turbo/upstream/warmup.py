"""Upstream's entry points, called once with little work: what a warm-up runs."""

from __future__ import annotations

import copy
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .alignment import contained
from .families import Parts
from .patch_points import GPT2
from .t3 import is_llama

SAMPLE_RATE = 24_000
TEXT_TOKENS = 8


def voice_attribute(parts: Parts) -> str:
    """The attribute of the model that holds the reference voice."""
    return "ref_dict" if parts.family == "vc" else "conds"


def copy_voice(voice: Any) -> Any:
    """A voice that can be used without changing the original, which upstream caches embeddings in.

    Tensors are shared: they are never written to, and some belong to an autograd graph, which cannot be copied.
    """
    if voice is None or isinstance(voice, dict):
        return copy.copy(voice)
    twin = copy.copy(voice)
    twin.t3, twin.gen = copy.copy(voice.t3), dict(voice.gen)
    return twin


def write_tone(path: Path, seconds: float) -> Path:
    """A gliding tone with overtones as 16-bit mono WAV at 24 kHz, loud enough not to be trimmed as silence."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    glide = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * time)) / SAMPLE_RATE
    signal = sum(np.sin(k * glide) / k for k in range(1, 9)) * 0.2
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((signal * 32767 / np.abs(signal).max() * 0.5).astype("<i2").tobytes())
    return path


def request(parts: Parts) -> dict[str, Any]:
    """Arguments with which the model's ``generate`` speaks a short sentence by its own defaults; needs a voice."""
    return {"text": "Yes.", **({"language_id": "en"} if parts.family == "multilingual" else {})}


def prepare_voice(parts: Parts, audio: Path) -> None:
    """Encode a reference voice and leave it on the model."""
    (parts.model.set_target_voice if parts.family == "vc" else parts.model.prepare_conditionals)(str(audio))


@torch.inference_mode()
def speak(parts: Parts, tokens: int, with_t3: bool = True) -> None:
    """Decode ``tokens`` speech tokens (``with_t3``), turn as many into samples, mark them. Needs a voice."""
    if parts.t3 is not None and with_t3:
        _decode(parts, tokens)
    reference = parts.voice if parts.family == "vc" else parts.voice.gen
    steps = {"n_cfm_timesteps": 2} if parts.family in GPT2 else {}  # as ChatterboxTurboTTS.generate asks for
    ids = torch.arange(tokens, device=parts.device)
    wav, _ = parts.s3gen.inference(speech_tokens=ids, ref_dict=reference, **steps)
    if parts.watermarker is not None:
        parts.watermarker.apply_watermark(wav.squeeze(0).cpu().numpy(), sample_rate=parts.model.sr)


def _decode(parts: Parts, tokens: int) -> None:
    t3, voice = parts.t3, parts.voice.t3
    ids = [t3.hp.start_text_token, *range(1, TEXT_TOKENS + 1), t3.hp.stop_text_token]
    text = torch.tensor([ids], device=parts.device)
    if is_llama(t3):
        with contained(t3.tfmr):
            t3.inference(t3_cond=voice, text_tokens=text.repeat(2, 1), max_new_tokens=tokens, cfg_weight=0.5)
    else:
        t3.inference_turbo(t3_cond=voice, text_tokens=text, max_gen_len=tokens)
