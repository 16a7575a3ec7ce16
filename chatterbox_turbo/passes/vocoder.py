"""The vocoder by this package's own code in place of upstream's ``HiFTGenerator.inference``, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..runtime.host_memory import give_back, keep_freed_blocks
from ..runtime.scratch import Scratch
from ..runtime.vocoder import VocoderWeights, excite, synthesize, synthesize_all
from ..upstream import vocoder_weights
from .base import Context, Pass, Switch

LONG = 200  # frames (4 s): giving memory back first takes 40 ms, of half a second and more that these take


class VocoderPass(Pass):
    """Computes without upstream's modules, which keep their parametrizations."""

    name = "vocoder"
    summary = "HiFT vocoder: harmonics at once, activations in place; weights folded on GPUs"
    replaces = ("s3gen.mel2wav.inference", "s3gen.mel2wav.decode", "s3gen.mel2wav.m_source.l_sin_gen.forward")
    patch_points = (*replaces, "s3gen.hift_inference")

    def check(self, context: Context) -> str:
        try:
            vocoder_weights.check(context.parts.s3gen.mel2wav)
        except (UnsupportedModelError, AttributeError) as error:
            return str(error)
        return ""

    def apply(self, context: Context) -> str:
        module = context.parts.s3gen.mel2wav
        vocoder = Vocoder(module)
        context.journal.record("buffers of the vocoder", vocoder.release)
        vocoder.prepare()
        context.journal.wrap(module, "inference", lambda wrapped, _, args, kwargs: vocoder.calls(*args, **kwargs))
        context.engines.vocoder = vocoder
        return ""


class Vocoder:
    """Mel frames to samples in upstream's terms; ``calls`` are those of upstream's function."""

    def __init__(self, module: nn.Module):
        self._module, self._scratch = module, Scratch()
        self._weights: VocoderWeights | None = None
        self._addresses: Any = None
        self.calls = Switch(self.speak)

    def prepare(self) -> None:
        """Read the weights as they are now."""
        with torch.inference_mode(False), torch.no_grad():  # copies outlive the call
            # 80 MB beside the originals save 10 ms of a second on a CPU, but sixty launches on a GPU
            self._weights = vocoder_weights.read(self._module, fold=self._module.conv_pre.bias.device.type != "cpu")
        self._addresses = vocoder_weights.addresses(self._module)
        keep_freed_blocks()

    def release(self) -> None:
        """Give folded weights and buffers back."""
        self._weights = None
        self._scratch.release()

    @torch.inference_mode()
    def speak(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples (B, n) and source (B, 1, n); arguments as upstream's ``inference``."""
        if speech_feat.device.type == "cpu" and speech_feat.size(2) >= LONG:
            give_back()  # what flow matching has left in pieces that the vocoder's tensors do not fit into
        return synthesize(self._current(), speech_feat, cache_source, self._scratch)

    @torch.inference_mode()
    def source(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> Tensor:
        """The source (B, 1, n) that ``speak`` returns beside the samples; draws the same random numbers."""
        return excite(self._current(), speech_feat, cache_source)

    @torch.inference_mode()
    def speak_all(self, mels: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
        """Samples (1, n) of several utterances (1, 80, T) in one batch, each from its ``source``."""
        return synthesize_all(self._current(), mels, sources, self._scratch)

    def _current(self) -> VocoderWeights:
        if vocoder_weights.addresses(self._module) != self._addresses:  # somebody moved the weights after apply
            self.prepare()
        return self._weights
