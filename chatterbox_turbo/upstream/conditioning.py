"""Reference voices: what ``prepare_conditionals`` and ``set_target_voice`` compute, and where they put it."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ReferenceAudioError
from ..patching import Journal
from ..runtime.voice.cache import Voice
from ..runtime.voice.features import MelSpectrogram, speaker_embedding
from ..runtime.voice.reference_audio import Reference, Resampler, mel_power, resample, trim
from . import mel_frames
from .families import Parts
from .patch_points import GPT2, digest
from .structure import why_not_plain

logger = logging.getLogger(__name__)

SHORTEST = 0.05  # seconds: below, the speaker encoder's statistics are those of one frame, which are not numbers
SHORTEST_GPT2 = 5.0  # upstream asserts that there is more
TRIM_DB, OVERLAP_RATE, COVERAGE = 20, 1.3, 0.8  # defaults of VoiceEncoder.embeds_from_wavs and inference

# Module functions whose code is reproduced: no attribute of a model leads to them, so they are no patch points.
_VOICE_ENCODER = {"melspectrogram": "6ebce801a231", "get_num_wins": "ec3ff9a525dc", "get_frame_step": "f844881b30fb"}
_STFT = "52c63aaa6bd6"
_ENCODER_SETTINGS = {"preemphasis": 0.0, "mel_power": 2.0, "mel_type": "amp", "normalized_mels": False}


def entry_point(parts: Parts) -> str:
    """The method that encodes a reference voice."""
    return "set_target_voice" if parts.family == "vc" else "prepare_conditionals"


def _names(function: Any) -> dict[str, Any]:
    """The names that a function's code sees: its release's own constants and classes."""
    return inspect.unwrap(getattr(function, "__func__", function)).__globals__


def why_not(parts: Parts) -> str:
    """Why the encoders of this model are not the ones that this package reproduces; empty where they are."""
    names = _names(getattr(type(parts.model), entry_point(parts)))
    missing = [name for name in ("librosa", "S3GEN_SR", "S3_SR") if name not in names]
    if missing:
        return f"the module of {entry_point(parts)} has no {', '.join(missing)}"
    default = inspect.signature(names["librosa"].resample).parameters["res_type"].default
    if default != "soxr_hq":
        return f"librosa resamples with {default} here, not with soxr"
    encoder = parts.voice_encoder
    if encoder is None:
        return ""
    names = _names(type(encoder).embeds_from_wavs)
    for name, code in _VOICE_ENCODER.items():
        if digest(names.get(name)) != code:
            return f"the code of the voice encoder's {name} is not one that this package reproduces"
    if digest(_names(names["melspectrogram"]).get("_stft")) != _STFT:
        return "the code of the voice encoder's _stft is not one that this package reproduces"
    for name, value in _ENCODER_SETTINGS.items():
        if getattr(encoder.hp, name, None) != value:
            return f"the voice encoder's {name} is {getattr(encoder.hp, name, None)!r}, known is {value!r}"
    return ""


def reproduced_names(parts: Parts) -> list[tuple[Any, str]]:
    """Where upstream's encoders find the functions that are reproduced here: (namespace, name) pairs."""
    encoder = parts.voice_encoder
    if encoder is None:
        return []
    space = sys.modules[type(encoder).__module__]
    mel = sys.modules.get(getattr(getattr(space, "melspectrogram", None), "__module__", ""))
    return [(space, name) for name in _VOICE_ENCODER] + ([] if mel is None else [(mel, "_stft")])


def mel_spectrogram(extractor: Any) -> MelSpectrogram | None:
    """Upstream's mel spectrogram of 24 kHz audio with its default arguments, or ``None`` for an unknown one."""
    defaults = mel_frames.defaults(extractor)
    if defaults is None:
        return None
    basis = _names(extractor)["librosa_mel_fn"](
        sr=defaults["sampling_rate"],
        n_fft=defaults["n_fft"],
        n_mels=defaults["num_mels"],
        fmin=defaults["fmin"],
        fmax=defaults["fmax"],
    )
    made = MelSpectrogram(basis, defaults["n_fft"], defaults["hop_size"])
    made.__wrapped__ = extractor  # who asks which mel frames these are finds upstream's function
    return made


def log_mels(s3gen: Any, samples: Tensor) -> Tensor:
    """Upstream's log-mel spectrogram (B, 80, frames) of samples (B, m) at 24 kHz."""
    return s3gen.mel_extractor(samples)


def tokenizer_layers(parts: Parts, journal: Journal) -> list[nn.Linear]:
    """The linear layers of the speech tokenizer, nearly all of the work; without those that somebody has altered."""
    linear = (module for module in parts.s3gen.tokenizer.modules() if isinstance(module, nn.Linear))
    return [module for module in linear if not why_not_plain(module, "s3gen.tokenizer", journal)]


class VoiceEncoding:
    """Upstream's encoders as a function from a recording to a voice.

    Args:
        parts: the model.
        on_host: average the speaker's embeddings on the host, as upstream does.
        resampler: from the recording's rate to 24 kHz, and from there to 16 kHz.
    """

    def __init__(self, parts: Parts, on_host: bool, resampler: Resampler = resample):
        names = _names(getattr(type(parts.model), entry_point(parts)))
        self._model, self._s3gen, self._encoder = parts.model, parts.s3gen, parts.voice_encoder
        self._gpt2 = parts.family in GPT2
        self._t3, self._on_host, self._resample = parts.t3, on_host, resampler
        self._rate, self._low_rate = names["S3GEN_SR"], names["S3_SR"]
        self._conditionals, self._t3_cond = names.get("Conditionals"), names.get("T3Cond")
        self._window: np.ndarray | None = None

    def modules(self) -> tuple[nn.Module, ...]:
        """The encoders, whose weights a voice depends on."""
        every = (self._encoder, self._s3gen.tokenizer, self._s3gen.speaker_encoder)
        return tuple(module for module in every if isinstance(module, nn.Module))

    def key(self, reference: Reference, normalized: bool) -> Hashable:
        """What the voice of a recording depends on beside the encoders' weights: content, lengths, how kernels run."""
        model, t3 = self._model, self._t3
        prompt = None if t3 is None else t3.hp.speech_cond_prompt_len
        kernels = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())  # they round differently
        lengths = (model.DEC_COND_LEN, model.ENC_COND_LEN, prompt)
        return reference.digest, normalized, lengths, str(model.device), kernels

    def encode(self, reference: Reference, normalize: bool) -> Voice:
        """The voice of a recording; ``normalize``: to -27 LUFS first (GPT-2 models).

        Raises:
            ReferenceAudioError: no audio, too little of it, or values that are not finite.
        """
        model, device = self._model, self._model.device
        samples = reference.samples(self._rate, self._resample)
        self._check_length(len(samples), reference.name)
        if normalize:  # its gain is a float64 scalar, which NumPy 2 spreads to the samples
            samples = model.norm_loudness(samples, self._rate).astype(np.float32, copy=False)
        used = samples[: model.DEC_COND_LEN]
        if np.abs(used).max() > 1.0:
            logger.warning("The reference audio %s goes beyond full scale: it may be clipped.", reference.name)
        # what is kept outlives a caller's inference mode, and leaving that mode turns gradients on
        with torch.inference_mode(False), torch.no_grad():
            gen = self._s3gen.embed_ref(used, self._rate, device=device)
            if self._t3 is None:
                return Voice({}, dict(gen))
            low = self._resample(samples, self._rate, self._low_rate)
            tokens = None
            if length := self._t3.hp.speech_cond_prompt_len:
                tokens, _ = self._s3gen.tokenizer.forward([low[: model.ENC_COND_LEN]], max_len=length)
                tokens = torch.atleast_2d(tokens).to(device)
            return Voice({"speaker_emb": self._speaker(low), "cond_prompt_speech_tokens": tokens}, dict(gen))

    def put(self, voice: Voice, exaggeration: float) -> None:
        """Make a voice, which is the model's from now on, the one that it speaks with."""
        if self._t3 is None:
            self._model.ref_dict = voice.gen
            return
        with torch.inference_mode(False):  # the voice outlives the call
            emotion = (exaggeration * torch.ones(1, 1, 1, dtype=torch.float32)).to(self._model.device)
        self._model.conds = self._conditionals(self._t3_cond(**voice.t3, emotion_adv=emotion), voice.gen)

    def _check_length(self, length: int, name: str) -> None:
        seconds = length / self._rate
        if self._gpt2 and seconds <= SHORTEST_GPT2:
            needed = f"more than {SHORTEST_GPT2:.0f} s"
        elif seconds < SHORTEST:
            needed = f"at least {SHORTEST} s"
        else:
            return
        raise ReferenceAudioError(
            f"The reference audio {name} is {seconds:.2f} s long.",
            f"This model needs {needed} of a voice.",
            "Use a longer recording; ten seconds are a good length.",
        )

    def _speaker(self, samples: np.ndarray) -> Tensor:
        """Speaker embedding (1, 256) float32 of samples at 16 kHz, on the model's device."""
        encoder, hp = self._encoder, self._encoder.hp
        names = _names(_names(type(encoder).embeds_from_wavs)["melspectrogram"])
        if self._window is None:
            self._window = names["librosa"].filters.get_window("hann", hp.win_size, fftbins=True)
        mel = mel_power(trim(samples, TRIM_DB), names["mel_basis"](hp), self._window, hp.hop_size)
        mel = torch.from_numpy(np.ascontiguousarray(mel, dtype=np.float32)).to(encoder.device)
        step = int(np.round((hp.sample_rate / OVERLAP_RATE) / hp.ve_partial_frames))
        embedding = speaker_embedding(encoder, mel, hp.ve_partial_frames, step, COVERAGE, self._on_host)
        return embedding.to(self._model.device)
