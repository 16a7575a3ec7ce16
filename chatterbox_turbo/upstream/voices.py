"""Voices as upstream has them (``Conditionals``, voice conversion's ``ref_dict``) and as they are kept under a name."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import brief
from ..runtime.device.surroundings import lasting
from ..runtime.voice.cache import Voice
from .conditioning import entry_point
from .families import TITLES, Parts
from .warmup import copy_voice

T3_NAMES = ("speaker_emb", "cond_prompt_speech_tokens")
GEN_NAMES = ("prompt_token", "prompt_token_len", "prompt_feat", "prompt_feat_len", "embedding")
SAMPLE_RATE, FRAMES_PER_SECOND = 24_000, 50
LARGEST = 2**24  # numbers in one tensor: a view of few may claim to have any shape
# made anew from these for each call: of the weights, and of the exaggeration that is asked for
_DERIVED = ("cond_prompt_speech_emb", "emotion_adv")
_SHAPES = {  # dimensions, whether whole numbers, and whether there may be none
    "speaker_emb": (2, False, False),
    "cond_prompt_speech_tokens": (2, True, True),
    "prompt_token": (2, True, False),
    "prompt_token_len": (1, True, False),
    "prompt_feat": (3, False, False),
    "prompt_feat_len": (1, True, True),
    "embedding": (2, False, False),
}
_EXACT = {torch.bfloat16: 2**8, torch.float16: 2**11}  # ids above are rounded in these formats
# Upstream publishes one conds.pt for the first three, and voice conversion takes the half that it needs.
_SPEAKS = {
    "english": ("english", "multilingual"),
    "multilingual": ("multilingual", "english"),
    "vc": ("vc", "english", "multilingual"),
}
_MODULES = {"tts": "english", "mtl_tts": "multilingual", "tts_turbo": "turbo"}


@dataclass(frozen=True)
class NamedVoice:
    """A voice that is kept under a name: tensors on the host, which nobody writes to.

    Attributes:
        family: of the model that encoded it.
        source: what it was made of: ``kind`` is recording (with ``sha256`` of the file), conditionals, or blend (with
            ``of``: weights by name).
        sample_rate: of its mel frames, in Hz.
        package: the version of this package that made it.
    """

    voice: Voice
    family: str
    source: Mapping[str, Any] = field(default_factory=lambda: {"kind": "conditionals"})
    sample_rate: int = SAMPLE_RATE
    package: str = __version__

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.voice.nbytes

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of names, formats, shapes and values."""
        content = hashlib.sha256()
        for name, tensor in named_tensors(self.voice).items():
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What there is to know of it, as plain values."""
        tokens = self.voice.t3.get("cond_prompt_speech_tokens")
        return {
            "family": self.family,
            "bytes": self.nbytes,
            "reference_seconds": self.voice.gen["prompt_feat"].shape[1] / FRAMES_PER_SECOND,
            "prompt_tokens": 0 if tokens is None else tokens.shape[1],
            "sample_rate": self.sample_rate,
            "source": dict(self.source),
            "package": self.package,
        }


def named_tensors(voice: Voice) -> dict[str, Tensor]:
    """The tensors of a voice by dotted name (``t3.speaker_emb``), sorted."""
    each = {f"{half}.{name}": value for half in ("t3", "gen") for name, value in getattr(voice, half).items()}
    return {name: each[name] for name in sorted(each) if each[name] is not None}


def is_voice(given: Any) -> bool:
    """Whether something is upstream's ``Conditionals``, or a ``ref_dict``."""
    return (hasattr(given, "t3") and hasattr(given, "gen")) or (isinstance(given, Mapping) and "prompt_feat" in given)


def handed(parts: Parts, given: Any) -> Any:
    """What a caller gives for one call, as ``generate`` takes it and may write to it; ``None``: it is no voice."""
    if not is_voice(given) or (parts.t3 is not None and isinstance(given, Mapping)):
        return None
    return copy_voice(given) if parts.t3 is not None else dict(halves(given)[1])


def halves(given: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What ``is_voice``, as values by name: of T3, and of S3Gen."""
    return ({}, given) if isinstance(given, Mapping) else (vars(given.t3), given.gen)


def cleaned(t3: Mapping[str, Any], gen: Mapping[str, Any]) -> Voice:
    """A voice of its own on the host, without what is made anew for each call.

    Args:
        t3: attributes of upstream's ``T3Cond``; empty where there is no such half.
        gen: upstream's ``ref_dict``, of tensors or arrays.

    Raises:
        ValueError: it is no voice, or a damaged one; the message says what is wrong.
    """
    found = []
    for half, given, known, ignored in (("t3", t3, T3_NAMES, _DERIVED), ("gen", gen, GEN_NAMES, ())):
        if not isinstance(given, Mapping):
            raise ValueError(f"{half} is {brief(given)}, not values by name")
        unknown = sorted(str(name) for name in given if name not in (*known, *ignored) and given[name] is not None)
        if unknown:
            raise ValueError(f"{half} has {', '.join(map(brief, unknown))}, which this package does not know")
        if half == "t3" and not given:
            found.append({})
            continue
        if given.get("cond_prompt_speech_emb") is not None and given.get("cond_prompt_speech_tokens") is None:
            raise ValueError("it has embeddings of a prompt without the prompt's tokens")
        found.append({name: _tensor(name, given.get(name)) for name in known})
    return Voice(*found)


def _tensor(name: str, given: Any) -> Tensor | None:
    dimensions, whole, optional = _SHAPES[name]
    if given is None and optional:
        return None
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is {brief(given)}, not a tensor")
    if given.dim() != dimensions or given.shape[0] != 1 or not 0 < given.numel() <= LARGEST or given.is_complex():
        raise ValueError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)}, and one of a single voice was expected"
        )
    with lasting():
        given = given.detach().to("cpu", copy=True).contiguous()
        return _ids(name, given) if whole else _finite(name, given.float())


def _finite(name: str, values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite numbers")
    return values


def _ids(name: str, ids: Tensor) -> Tensor:
    """Whole numbers, int64: upstream's ``generate`` turns those of the voice that it speaks with into fractions."""
    if ids.is_floating_point():
        _finite(name, ids.float())
        if float(ids.abs().max()) > _EXACT.get(ids.dtype, 2**24):
            raise ValueError(f"{name} was rounded: upstream has cast it to {ids.dtype}, in which ids are not exact")
        if not torch.equal(ids, ids.round()):
            raise ValueError(f"{name} has fractions, and whole numbers were expected")
    if bool((ids < 0).any()):
        raise ValueError(f"{name} has numbers below 0")
    return ids.long()


def family_of(given: Any, parts: Parts) -> str:
    """The family that upstream's object is of: by its class where that tells, otherwise the model's."""
    made = _MODULES.get(type(given).__module__.rpartition(".")[2], parts.family)
    return parts.family if {made, parts.family} == {"turbo", "nano"} else made


def why_not(named: NamedVoice, parts: Parts) -> str:
    """Why a model cannot speak with a voice; empty where it can."""
    speaks = _SPEAKS.get(parts.family, (parts.family,))
    if named.family not in speaks:
        return f"It is a voice of {TITLES.get(named.family, brief(named.family))}: {_difference(named, parts)}"
    gen, flow = named.voice.gen, parts.s3gen.flow
    wanted = {
        "embedding": (gen["embedding"].shape[1], flow.spk_embed_affine_layer.in_features),
        "prompt_feat": (gen["prompt_feat"].shape[2], flow.output_size),
    }
    ids = {"prompt_token": (gen["prompt_token"], flow.input_embedding.num_embeddings)}
    if parts.t3 is not None:
        hp, tokens = parts.t3.hp, named.voice.t3.get("cond_prompt_speech_tokens")
        if not named.voice.t3:
            return "It has no half for T3 (speaker embedding, speech tokens of the prompt)"
        wanted["speaker_emb"] = (named.voice.t3["speaker_emb"].shape[1], hp.speaker_embed_size)
        longest = hp.speech_cond_prompt_len
        if bool(longest) != (tokens is not None):
            return f"Its prompt for T3 is {'missing' if tokens is None else 'one that this model does not take'}"
        if tokens is not None:
            ids["cond_prompt_speech_tokens"] = (tokens, hp.speech_tokens_dict_size)
            if tokens.shape[1] > longest:
                return f"T3's prompt has {tokens.shape[1]} speech tokens, and this model's {longest} at most"
    for name, (size, expected) in wanted.items():
        if size != expected:
            return f"{name} has {size} values, and this model needs {expected}"
    for name, (values, count) in ids.items():
        if int(values.max()) >= count:
            return f"{name} has the id {int(values.max())}, and this model knows {count}"
    return ""


def _difference(named: NamedVoice, parts: Parts) -> str:
    if named.family == "vc":
        return "it has no half for T3 (speaker embedding, speech tokens of the prompt)"
    return f"the encoders and prompts of {TITLES[parts.family]} are others"


def conditionals(parts: Parts, voice: Voice) -> Any:
    """A voice as upstream's ``generate`` takes it (``Conditionals`` or ``ref_dict``), a copy on the model's device.

    The exaggeration is the default of the method that encodes; ``generate`` puts its own in place.
    """
    device = parts.model.device
    with lasting():
        t3, gen = (
            {name: _copied(value, device) if isinstance(value, Tensor) else value for name, value in half.items()}
            for half in (voice.t3, voice.gen)
        )
        if parts.t3 is None:
            return gen
        encode = getattr(type(parts.model), entry_point(parts))
        emotion = (_exaggeration(encode) * torch.ones(1, 1, 1)).to(device)
    whole, half = (_upstreams(parts.model, name) for name in ("Conditionals", "T3Cond"))
    return whole(half(**t3, emotion_adv=emotion), gen)


def _copied(tensor: Tensor, device: Any) -> Tensor:
    if torch.device(device).type == "cpu":  # by NumPy: torch has its threads copy, whose start takes milliseconds
        return torch.from_numpy(tensor.numpy().copy())
    return tensor.to(device)


def options(parts: Parts) -> tuple[str, ...]:
    """What the method that encodes a recording takes beside the recording and the exaggeration."""
    names = tuple(inspect.signature(getattr(type(parts.model), entry_point(parts))).parameters)
    return tuple(name for name in names[2:] if name != "exaggeration")


@functools.cache
def _exaggeration(encode: Callable[..., Any]) -> float:
    """Upstream's default."""
    given = inspect.signature(encode).parameters.get("exaggeration")
    return 0.5 if given is None or given.default is inspect.Parameter.empty else float(given.default)


def _upstreams(model: Any, name: str) -> Any:
    """A class of the release that a model is of; subclasses of an app are in modules without it."""
    modules = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    return next(getattr(module, name) for module in modules if hasattr(module, name))
