"""What a model object is, decided by looking at it, never by its version or its class's name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError

FAMILIES = ("english", "multilingual", "turbo", "nano", "vc")
TITLES = {
    "english": "ChatterboxTTS (English)",
    "multilingual": "ChatterboxMultilingualTTS",
    "turbo": "ChatterboxTurboTTS",
    "nano": "ChatterboxTurboTTS (Nano)",
    "vc": "ChatterboxVC (voice conversion)",
}
NANO_WIDTH = 768  # GPT-2 small; GPT-2 medium is 1024


@dataclass(frozen=True)
class Parts:
    """An upstream model and its parts under one set of names; ``None`` where the family has no such part."""

    family: str
    model: Any
    s3gen: nn.Module
    t3: nn.Module | None = None
    voice_encoder: nn.Module | None = None
    tokenizer: Any = None

    @property
    def watermarker(self) -> Any:
        """PerTh's watermarker, or whatever a server put in its place."""
        return getattr(self.model, "watermarker", None)

    @property
    def device(self) -> torch.device:
        """The device that the acoustic half (and so the model) is on."""
        return device_of(self)

    @property
    def voice(self) -> Any:
        """The reference voice in use (``conds``, or ``ref_dict`` of voice conversion), or ``None``."""
        return getattr(self.model, "ref_dict" if self.family == "vc" else "conds", None)

    def modules(self) -> dict[str, nn.Module]:
        """The modules that hold weights, by a name that fits a report; no parameter counts twice."""
        tree = {
            "t3": self.t3,
            "s3gen.tokenizer": getattr(self.s3gen, "tokenizer", None),
            "s3gen.speaker_encoder": getattr(self.s3gen, "speaker_encoder", None),
            "s3gen.flow": getattr(self.s3gen, "flow", None),
            "s3gen.mel2wav": getattr(self.s3gen, "mel2wav", None),
            "ve": self.voice_encoder,
            "watermarker": getattr(self.watermarker, "perth_net", None),
        }
        return {name: module for name, module in tree.items() if isinstance(module, nn.Module)}


def device_of(model: Any) -> torch.device:
    """The device that a model's acoustic half is on."""
    return next(model.s3gen.parameters()).device


def identify(model: Any) -> Parts:
    """The family and parts of an upstream model.

    Raises:
        UnsupportedModelError: the object lacks what every family has; the message names it.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    s3gen = getattr(model, "s3gen", None)
    if not isinstance(s3gen, nn.Module) or not callable(getattr(model, "generate", None)):
        hint = ""
        for name, value in getattr(model, "__dict__", {}).items():
            if hasattr(value, "s3gen"):
                hint = f" Its attribute {name!r} looks like one: pass that."
        raise UnsupportedModelError(
            f"{kind} is not a chatterbox model.",
            "It has no module `s3gen` or no method `generate`.",
            "Pass the object that from_pretrained or from_local of ChatterboxTTS, ChatterboxMultilingualTTS, "
            "ChatterboxTurboTTS or ChatterboxVC returned." + hint,
        )
    t3 = getattr(model, "t3", None)
    if t3 is None:
        if not callable(getattr(model, "set_target_voice", None)):
            raise UnsupportedModelError(f"{kind} has neither `t3` nor `set_target_voice`.", "No family is like that.")
        return Parts("vc", model, s3gen)
    backbone = getattr(t3, "tfmr", None)
    if hasattr(backbone, "h"):
        family = "nano" if getattr(t3, "dim", None) == NANO_WIDTH else "turbo"
    elif hasattr(backbone, "layers"):
        speaks = "language_id" in inspect.signature(model.generate).parameters
        family = "multilingual" if speaks or getattr(t3.hp, "is_multilingual", False) else "english"
    else:
        raise UnsupportedModelError(
            f"{kind} has an unknown T3 backbone.",
            f"`t3.tfmr` is a {type(backbone).__name__}; known are Llama (`layers`) and GPT-2 (`h`).",
        )
    return Parts(family, model, s3gen, t3, getattr(model, "ve", None), getattr(model, "tokenizer", None))
