"""The way of an utterance through upstream's ``generate``, as stages with names.

    voice     condition   a reference recording, an exaggeration → the voice on the model
    request   ask         text and voice → the arguments of T3
    tokens    decode      T3; spoken: those of its ids that have a sound, with the family's tail
    frames    frames      flow matching: speech tokens → mel frames (1, 80, 2 n), 50 a second
    samples   samples     HiFT: mel frames → samples (1, 960 n) at 24 kHz, the start faded in
    marked    mark        PerTh's watermark; crop: what a release cuts off the end

Each does what the code of ``generate`` and of ``s3gen.inference`` does there, in the same order and with the same
random numbers (``tts.py``, ``mtl_tts.py``, ``tts_turbo.py``, ``vc.py``, ``models/s3gen/s3gen.py``; 0.1.4 to the
development branch of July 2026). Where their code is another, ``why_not`` says so, and ``generate`` stays upstream's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidRequestError
from ..patching import Journal
from .families import Parts
from .flow_inputs import TOKEN_SAMPLES
from .patch_points import GPT2, LLAMA, digest, first_problem
from .t3 import entrance

POINTS = ("generate", "s3gen.inference", "s3gen.flow_inference", "s3gen.hift_inference")
GUIDED_KNOBS = ("temperature", "cfg_weight", "repetition_penalty", "min_p", "top_p")
UNGUIDED_KNOBS = ("temperature", "top_k", "top_p", "repetition_penalty")
VOCABULARY = 6561  # ids from here on have no sound
_CROPPING = frozenset({"fedd296dec44"})  # Multilingual of the development branch: without the last token's 40 ms


def why_not(parts: Parts, journal: Journal) -> str:
    """Why the stages of this model are not known; empty where they are."""
    return first_problem(parts, POINTS, journal)


def knobs(family: str) -> tuple[str, ...]:
    """The numbers that a family's ``generate`` speaks by, less those that it takes and does not heed."""
    return (*GUIDED_KNOBS, "exaggeration") if family in LLAMA else UNGUIDED_KNOBS


def stages(parts: Parts) -> Stages:
    """The stages of a model's family."""
    kinds = {**dict.fromkeys(LLAMA, GuidedStages), **dict.fromkeys(GPT2, UnguidedStages), "vc": ConversionStages}
    return kinds[parts.family](parts)


class Stages:
    """What families have in common. ``given``: the arguments of ``generate`` by name, defaults included."""

    subject, reference = "text", "audio_prompt_path"

    def __init__(self, parts: Parts):
        function = type(parts.model).generate
        self._parts, self._model = parts, parts.model
        self._signature = inspect.signature(function)
        # the names that upstream's code sees: its release's own functions and constants, patched ones included
        self._names = inspect.unwrap(function).__globals__
        self._crops = digest(function) in _CROPPING

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``generate`` by name.

        Raises:
            TypeError: as calling it would.
            ValueError: a language that the model does not know.
        """
        bound = self._signature.bind(self._model, *args, **kwargs)
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])

    def condition(self, given: dict[str, Any]) -> Any:
        """The voice that the utterance is spoken with, which is the model's own afterwards.

        Raises:
            InvalidRequestError: there is none.
        """
        raise NotImplementedError

    def ask(self, given: dict[str, Any], voice: Any) -> dict[str, Any]:
        """The arguments of T3's entrance."""
        raise NotImplementedError

    def spelling(self, asked: dict[str, Any]) -> list[str]:
        """The text tokens (S,) of a request as they are written in the vocabulary; Multilingual's only."""
        ids = asked["text_tokens"][0].tolist()
        return [self._model.tokenizer.tokenizer.id_to_token(number) or "" for number in ids]

    def decode(self, asked: dict[str, Any]) -> Tensor:
        """Ids (1, n) int64 of T3 by its own entrance, whoever is behind that."""
        return getattr(self._parts.t3, entrance(self._parts.t3))(**asked)

    def spoken(self, tokens: Tensor) -> Tensor:
        """Speech tokens (n,) int64 that the acoustic half gets for T3's ids (1, m)."""
        raise NotImplementedError

    def sounding(self, ids: Sequence[int]) -> list[int]:
        """Those of T3's ids, in any portion of them, that have a sound.

        Upstream's Multilingual model lets ids without one through, and fails on them, but for start and stop.
        """
        return [number for number in ids if number < VOCABULARY]

    def tail(self) -> Tensor:
        """Speech tokens (n,) that the family adds behind the last one."""
        return torch.empty(0, dtype=torch.long, device=self._model.device)

    def voice_reference(self, voice: Any) -> dict[str, Any]:
        """What a voice is to the acoustic half."""
        return voice.gen

    def steps(self) -> int | None:
        """Euler steps that ``generate`` asks for; ``None``: the model's own number."""
        return None

    def frames(self, tokens: Tensor, reference: dict[str, Any]) -> Tensor:
        """Mel frames (1, 80, 2 n) of speech tokens (n,) or (1, n)."""
        s3gen, steps = self._parts.s3gen, self.steps()
        options = {} if steps is None else {"n_cfm_timesteps": steps}
        mel = s3gen.flow_inference(tokens, ref_wav=None, ref_sr=None, ref_dict=reference, finalize=True, **options)
        return self.in_format(mel)

    def in_format(self, mel: Tensor) -> Tensor:
        """Mel frames in the format that the vocoder is given: the flow's, in releases that cast."""
        return mel.to(dtype=getattr(self._parts.s3gen, "dtype", mel.dtype))

    def samples(self, mel: Tensor) -> Tensor:
        """Samples (1, m) of mel frames (1, 80, T), without the spillover of the reference at their start."""
        return self.faded(self.vocode(mel))

    def vocode(self, mel: Tensor) -> Tensor:
        """Samples (1, m) of mel frames (1, 80, T), as the vocoder makes them."""
        return self._parts.s3gen.hift_inference(mel, None)[0]

    def faded(self, samples: Tensor) -> Tensor:
        """The first 40 ms of samples (1, m) silenced and faded in, in place."""
        fade = self.fade()
        samples[:, : len(fade)] *= fade
        return samples

    def fade(self) -> Tensor:
        """(960,) what the first samples are multiplied by."""
        return self._parts.s3gen.trim_fade

    def crop(self, count: int) -> int | None:
        """Samples that are left of an utterance of ``count`` speech tokens; ``None``: all."""
        return max(1, count - 1) * TOKEN_SAMPLES if self._crops else None

    def mark(self, samples: Tensor, count: int) -> np.ndarray:
        """Marked samples (m,) of samples (1, n); ``count``: speech tokens that they are of."""
        return self.watermark(samples.squeeze(0).detach().cpu().numpy()[: self.crop(count)])

    def watermark(self, signal: np.ndarray) -> np.ndarray:
        """Marked samples (m,) of samples (n,) float32, m <= n."""
        return self._model.watermarker.apply_watermark(signal, sample_rate=self._model.sr)

    def _present(self, voice: Any) -> Any:
        if voice is None:
            name = "set_target_voice" if self.reference == "target_voice_path" else "prepare_conditionals"
            raise InvalidRequestError(
                "The model has no voice.", f"{self.reference} was not given.", f"Pass it, or call {name} first."
            )
        return voice


class _Speaking(Stages):
    """Text and voice to T3."""

    prepared_with: tuple[str, ...] = ("exaggeration",)

    def condition(self, given: dict[str, Any]) -> Any:
        model = self._model
        if given[self.reference]:
            model.prepare_conditionals(given[self.reference], **{name: given[name] for name in self.prepared_with})
        return self._present(model.conds)

    def _text(self, given: dict[str, Any]) -> str:
        return self._names["punc_norm"](given["text"])


class GuidedStages(_Speaking):
    """English and Multilingual: text tokens between their marks, twice where there is guidance."""

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = super().bind(args, kwargs)
        language = given.get("language_id")
        if language and language.lower() not in self._names["SUPPORTED_LANGUAGES"]:
            known = ", ".join(self._names["SUPPORTED_LANGUAGES"])
            raise ValueError(f"Unsupported language_id '{language}'. Supported languages: {known}")
        return given

    def condition(self, given: dict[str, Any]) -> Any:
        voice, exaggeration = super().condition(given), given["exaggeration"]
        if float(exaggeration) != float(voice.t3.emotion_adv[0, 0, 0]):
            old = voice.t3
            voice.t3 = self._names["T3Cond"](
                speaker_emb=old.speaker_emb,
                cond_prompt_speech_tokens=old.cond_prompt_speech_tokens,
                emotion_adv=exaggeration * torch.ones(1, 1, 1),
            ).to(device=self._model.device)
        return voice

    def ask(self, given: dict[str, Any], voice: Any) -> dict[str, Any]:
        model, hp, multilingual = self._model, self._parts.t3.hp, self._parts.family == "multilingual"
        language = given.get("language_id")
        options = {"language_id": language.lower() if language else None} if multilingual else {}
        text = model.tokenizer.text_to_tokens(self._text(given), **options).to(model.device)
        if multilingual or given["cfg_weight"] > 0.0:
            text = torch.cat([text, text], dim=0)
        text = F.pad(F.pad(text, (1, 0), value=hp.start_text_token), (0, 1), value=hp.stop_text_token)
        return {
            "t3_cond": voice.t3,
            "text_tokens": text,
            "max_new_tokens": 1000,
            **{name: given[name] for name in GUIDED_KNOBS},
        }

    def spoken(self, tokens: Tensor) -> Tensor:
        tokens = self._names["drop_invalid_tokens"](tokens[0])
        if self._parts.family == "english":
            tokens = tokens[tokens < VOCABULARY]
        return tokens.to(self._model.device)


class UnguidedStages(_Speaking):
    """Turbo and Nano: a tokenizer of Transformers, and silence behind the last token."""

    prepared_with = ("exaggeration", "norm_loudness")

    def ask(self, given: dict[str, Any], voice: Any) -> dict[str, Any]:
        if any(given[name] > 0.0 for name in ("cfg_weight", "exaggeration", "min_p")):
            self._names["logger"].warning(
                "CFG, min_p and exaggeration are not supported by Turbo version and will be ignored."
            )
        model = self._model
        text = model.tokenizer(self._text(given), return_tensors="pt", padding=True, truncation=True)
        asked = {"t3_cond": voice.t3, "text_tokens": text.input_ids.to(model.device)}
        return {**asked, **{name: given[name] for name in UNGUIDED_KNOBS}}

    def spoken(self, tokens: Tensor) -> Tensor:
        tokens = tokens[tokens < VOCABULARY].to(self._model.device)
        return torch.cat([tokens, self.tail()])

    def tail(self) -> Tensor:
        return torch.full((3,), self._names["S3GEN_SIL"], dtype=torch.long, device=self._model.device)

    def steps(self) -> int | None:
        return 2


class ConversionStages(Stages):
    """Voice conversion: what T3 is to the others, the speech tokenizer is here."""

    subject, reference = "audio", "target_voice_path"

    def condition(self, given: dict[str, Any]) -> Any:
        model = self._model
        if given[self.reference]:
            model.set_target_voice(given[self.reference])
        return self._present(model.ref_dict)

    def ask(self, given: dict[str, Any], voice: Any) -> dict[str, Any]:
        samples, _ = self._names["librosa"].load(given["audio"], sr=self._names["S3_SR"])
        return {"audio": torch.from_numpy(samples).float().to(self._model.device)[None]}

    def decode(self, asked: dict[str, Any]) -> Tensor:
        return self._parts.s3gen.tokenizer(asked["audio"])[0]

    def spoken(self, tokens: Tensor) -> Tensor:
        return tokens

    def voice_reference(self, voice: Any) -> dict[str, Any]:
        return voice
