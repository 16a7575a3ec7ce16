"""Upstream's ``AlignmentStreamAnalyzer`` (multilingual, up to 0.1.7): building it, and taking it down again.

Upstream builds one for every call; each registers a forward hook on three attention layers, drops the
handles, and switches the shared configuration to eager attention with maps, for good.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import forks
from .patch_points import digest
from .t3 import needs_attention_maps

_MODULE = "alignment_stream_analyzer"
# Every configuration entry that the constructor sets, in the spellings of Transformers 4.46 to 5.17.
_SWITCHES = ("output_attentions", "attn_implementation")


def analyzer_class(t3: nn.Module) -> type | None:
    """The analyzer that this release of upstream uses for this model, or ``None``."""
    module = sys.modules.get(type(t3).__module__)
    return getattr(module, "AlignmentStreamAnalyzer", None) if getattr(t3.hp, "is_multilingual", False) else None


# AlignmentStreamAnalyzer.step, whose decisions runtime.t3.alignment makes; 0.1.3 to 0.1.7
_STEP = "5fb7dafc78e5"


def analysis_names(t3: nn.Module) -> list[tuple[Any, str]]:
    """Where upstream finds its analyzer and what that decides by: (namespace, name) pairs."""
    cls = analyzer_class(t3)
    if cls is None:
        return []
    return [(sys.modules[type(t3).__module__], "AlignmentStreamAnalyzer"), (cls, "step")]


def why_not_analysis(t3: nn.Module) -> str:
    """Why this package's analysis does not decide as the model's analyzer; empty where it does, or there is none."""
    cls = analyzer_class(t3)
    if cls is None or digest(cls.step) == _STEP:
        return ""
    return f"the code of {cls.__name__}.step is not one that this package reproduces (digest {digest(cls.step)})"


def build_analyzer(t3: nn.Module, conditioning: int, text_length: int) -> Any | None:
    """An analyzer for one generation whose text begins after ``conditioning`` positions, or ``None``."""
    cls = analyzer_class(t3)
    if cls is None:
        return None
    span, config = (conditioning, conditioning + text_length), t3.tfmr.config
    maps_asked_for = config.output_attentions
    analyzer = cls(t3.tfmr, None, text_tokens_slice=span, alignment_layer_idx=9, eos_idx=t3.hp.stop_speech_token)
    if not needs_attention_maps(t3):
        # eager attention hands its maps to the analyzer's hooks anyway; with the switch on, Transformers would
        # hang two capturing hooks of its own on every layer, for good, and collect the maps of all of them
        config.output_attentions = maps_asked_for
    return analyzer


class UpstreamAnalysis:
    """An analyzer as the token loop's constraint, for one request: hooks on the backbone feed it."""

    def __init__(self, analyzer: Any):
        self._analyzer = analyzer
        self._seen: list[Tensor] | None = None

    def begin(self, requests: int) -> None:
        """An analyzer is made for each call."""

    def admit(self, start: int, length: int) -> None:
        """The analyzer knows its text from its construction."""

    def keep(self, steps: int) -> None:
        """Keep what the hooks see from now on."""
        self._seen = []

    def kept(self, number: int, steps: int) -> Tensor:
        """(steps, S) float32 on the host."""
        return torch.stack(self._seen[:steps])

    def observe(self, attention: Tensor | None) -> None:
        """The analyzer's hooks have seen more."""

    def constrain(self, logits: Tensor, previous: Tensor) -> Tensor:
        if self._seen is not None:
            start, end = self._analyzer.text_tokens_slice
            maps = torch.stack(self._analyzer.last_aligned_attns)[:, -1, start:end]
            self._seen.append(maps.float().mean(dim=0))
        return self._analyzer.step(logits, next_token=int(previous))

    def reasons(self) -> None:
        """The analyzer logs its own."""

    def leave(self, number: int) -> None:
        """The hooks end with the call (``contained``)."""


def analyzer_hooks(backbone: nn.Module) -> list[tuple[nn.Module, int]]:
    """Forward hooks that analyzers have registered: the attention module and the hook's id."""
    return [
        (layer.self_attn, key)
        for layer in backbone.layers
        for key, hook in layer.self_attn._forward_hooks.items()
        if _MODULE in (getattr(hook, "__module__", "") or "")
    ]


@contextmanager
def contained(backbone: nn.Module) -> Iterator[None]:
    """Undo on exit what an analyzer built inside does to the backbone: its hooks and configuration switches."""
    before = set(analyzer_hooks(backbone))
    config = vars(backbone.config)
    switches = {key: value for key, value in config.items() if any(name in key for name in _SWITCHES)}

    def undo() -> None:
        for module, key in analyzer_hooks(backbone):
            if (module, key) not in before:
                del module._forward_hooks[key]
        for key in [key for key in config if any(name in key for name in _SWITCHES)]:
            if key in switches:
                config[key] = switches[key]
            else:
                del config[key]

    with forks.undoing(undo):
        yield
