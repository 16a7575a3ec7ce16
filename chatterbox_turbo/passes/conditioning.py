"""Reference voices: encoded once, without an autograd graph, and without what numba compiles for librosa."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch

from ..config import Fidelity
from ..runtime.arguments import number
from ..runtime.cpu.onednn import linear_forward, onednn, onednn_is_faster
from ..runtime.device.surroundings import lasting
from ..runtime.voice.cache import VoiceCache
from ..runtime.voice.reference_audio import Reference, resample, resample_on
from ..runtime.voice.unreadable import refuse
from ..upstream import conditioning as upstream
from ..upstream.patch_points import ALL
from ..upstream.prepared import Prepared
from .base import Context, Pass

REFERENCES = ("audio_prompt_path", "target_voice_path")


class ConditioningPass(Pass):
    """Replaces ``prepare_conditionals`` and ``set_target_voice``; encodes each recording once.

    The speech tokenizer's products, nearly all of the time, go to oneDNN where the ceiling allows another order of
    summation. A voice is assigned when it is complete, so that bad audio leaves the old one.
    """

    name = "conditioning"
    summary = "reference voices encoded once, without an autograd graph and without numba"
    families = ALL
    patch_points = (
        "prepare_conditionals",
        "set_target_voice",
        "ve.embeds_from_wavs",
        "ve.embeds_from_mels",
        "ve.inference",
        "s3gen.embed_ref",
        "s3gen.tokenizer.forward",
    )
    replaces = (
        "prepare_conditionals",
        "set_target_voice",
        "ve.embeds_from_wavs",
        "ve.embeds_from_mels",
        "ve.inference",
    )

    def fidelity(self, context: Context) -> Fidelity:
        config, section = context.config, context.config.conditioning
        if section.promise == "exact" and section.matmul == "auto" and config.fidelity != "exact":
            return "numerical"
        return section.promise

    def check(self, context: Context) -> str:
        if context.config.conditioning.matmul == "onednn":
            device = context.parts.device
            if device.type != "cpu":
                return f"conditioning.matmul is onednn, which computes on CPUs, and the model is on {device}"
            if onednn() is None:
                return "conditioning.matmul is onednn, which this PyTorch was built without"
        return upstream.why_not(context.parts)

    def apply(self, context: Context) -> str:
        parts, section, journal = context.parts, context.config.conditioning, context.journal
        remarks = []
        mel = upstream.mel_spectrogram(parts.s3gen.mel_extractor)
        if mel is None:
            remarks.append("the mel spectrogram is upstream's: its code is unknown")
        else:
            journal.set(parts.s3gen, "mel_extractor", mel)
        journal.wrap(parts.s3gen, "embed_ref", _without_graph)
        if self._by_onednn(context):
            for layer in upstream.tokenizer_layers(parts, journal):
                journal.set(layer, "forward", linear_forward(layer))
            remarks.append("speech tokenizer by oneDNN")
        resampler = resample_on(parts.device) if section.resampling == "torchaudio" else resample
        encoding = upstream.VoiceEncoding(parts, self.fidelity(context) == "exact", resampler)
        context.voices = voices = VoiceCache(section.cache_bytes)
        context.reproduced += upstream.reproduced_names(parts)
        # what other weights have encoded is forgotten
        current = Prepared(encoding.modules, lambda: (encoding, ""), lambda _: voices.clear())
        context.prepared[self.name] = current
        name = upstream.entry_point(parts)
        context.entry_points[name] = _preparing(current, voices, getattr(type(parts.model), name))
        context.arguments.append(_recording)
        return "; ".join(remarks)

    def _by_onednn(self, context: Context) -> bool:
        choice = context.config.conditioning.matmul
        if choice != "auto" or context.config.fidelity == "exact":
            return choice == "onednn"
        return context.parts.device.type == "cpu" and onednn_is_faster(torch.get_num_threads())


def _without_graph(wrapped, instance, args, kwargs):
    """``embed_ref`` as upstream has it keeps all activations of the speaker encoder alive: 448 MB for ten seconds.

    No inference mode: upstream keeps resamplers in a cache of the process, which must stay ordinary tensors.
    """
    with lasting():
        return wrapped(*args, **kwargs)


def _recording(name: str, value: Any) -> Any:
    """Refuse what is no recording before upstream asks for its truth, which an array does not have."""
    if name in REFERENCES and value is not None and not isinstance(value, str | bytes | os.PathLike):
        refuse(value)
    return value


def _preparing(current: Prepared[upstream.VoiceEncoding], voices: VoiceCache, original: Any):
    """What runs in place of the entry point, with its arguments."""
    signature = inspect.signature(original)

    def prepare(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        exaggeration = number("exaggeration", given.get("exaggeration", 0.0))
        reference = Reference.open(given["wav_fpath"])
        encoding = current.current()
        normalize = bool(given.get("norm_loudness", False))
        key = encoding.key(reference, normalize)
        voice = voices.get(key)
        if voice is None:
            voice = encoding.encode(reference, normalize)
            voices.put(key, voice)
        encoding.put(voice, exaggeration)

    return prepare
