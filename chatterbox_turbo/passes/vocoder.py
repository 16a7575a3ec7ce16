"""The vocoder by this package's own code in place of upstream's ``HiFTGenerator.inference``.

HiFT to the bit, but for graphs, whose padded lengths cuDNN may compute by other algorithms, compiled code, and on a CPU
activations with channels last and transposed convolutions by other sums; with ``precision.vocoder`` its residual blocks
are in half precision. Or Vocos in its place, from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import Fidelity, VocoderSection
from ..runtime.cpu.onednn import wants_channels_last
from ..runtime.cpu.threads import why_no_kernels
from ..runtime.device.compilation import compiled
from ..runtime.device.half_precision import FORMATS
from ..runtime.memory.clearing import CachePolicy
from ..runtime.s3gen import streamed_vocoder
from ..runtime.s3gen.streaming import Windows
from ..runtime.s3gen.vocoder import VocoderWeights, excite, synthesize, synthesize_all
from ..runtime.s3gen.vocoder_network import Network, decode, prepare
from ..upstream import vocoder_weights
from ..upstream.prepared import Prepared
from . import vocos
from .base import Context, Pass, Switch
from .precision import PrecisionPass


class VocoderPass(Pass):
    """Computes without upstream's modules, which keep their parametrizations."""

    name = "vocoder"
    summary = "HiFT vocoder: harmonics at once, activations in place; weights folded on GPUs; or Vocos in its place"
    replaces = ("s3gen.mel2wav.inference", "s3gen.mel2wav.decode", "s3gen.mel2wav.m_source.l_sin_gen.forward")
    patch_points = (*replaces, "s3gen.hift_inference")

    def fidelity(self, context: Context) -> Fidelity:
        section = context.config.vocoder
        if section.kind == "vocos":
            return section.promise
        device, ceiling = context.parts.device, context.config.fidelity
        captures = section.graphs and ceiling != "exact" and device.type == "cuda"
        reordered = in_pieces(section, ceiling, device) or channels_last(section, ceiling, device)
        return "numerical" if captures or reordered else section.promise

    def check(self, context: Context) -> str:
        if context.config.vocoder.kind == "vocos":
            return vocos.why_not(context)
        return vocoder_weights.why_not(context.parts.s3gen.mel2wav, context.journal)

    def apply(self, context: Context) -> str:
        module, section = context.parts.s3gen.mel2wav, context.config.vocoder
        vocoder: Vocoder | vocos.VocosVocoder
        if section.kind == "vocos":
            vocoder = vocos.put(context)
        else:
            name = PrecisionPass().format_for(context, "vocoder")
            vocoder = Vocoder(module, section, context.config.fidelity, context.caches, FORMATS.get(name))
        context.journal.record("buffers of the vocoder", vocoder.release)
        remark = vocoder.prepare()
        context.journal.wrap(module, "inference", lambda wrapped, _, args, kwargs: vocoder.calls(*args, **kwargs))
        context.engines.vocoder = vocoder
        context.prepared[self.name] = vocoder.prepared
        context.remarks[self.name] = vocoder.remark
        return remark


def in_pieces(section: VocoderSection, ceiling: Fidelity, device: torch.device) -> bool:
    """Whether transposed convolutions are computed in pieces."""
    if device.type != "cpu" or section.compile:  # a compiler has one code for all lengths
        return False
    return section.upsampling == "pieces" or (section.upsampling == "auto" and ceiling != "exact")


def channels_last(section: VocoderSection, ceiling: Fidelity, device: torch.device) -> bool:
    """Whether activations lie with channels last."""
    if device.type != "cpu" or section.compile:  # a compiler lays them out by itself
        return False
    auto = section.layout == "auto" and ceiling != "exact" and wants_channels_last()
    return section.layout == "channels_last" or auto


class Vocoder:
    """Mel frames to samples in upstream's terms; ``calls`` are those of upstream's function.

    ``ceiling``: below ``numerical`` there are no graphs. ``caches``: what is given back before a call. ``dtype``: the
    half-precision format of the residual blocks, where they have one.

    Attributes:
        reach: mel frames on either side that a sample depends on.
        windows: how an utterance is cut where its stream does not say.
    """

    reach, windows = streamed_vocoder.SAMPLE_REACH, Windows()

    def __init__(
        self,
        module: nn.Module,
        section: VocoderSection,
        ceiling: Fidelity,
        caches: CachePolicy,
        dtype: torch.dtype | None = None,
    ):
        self._caches, self._dtype = caches, dtype
        self._module, self._section, self._ceiling = module, section, ceiling
        self.prepared: Prepared[tuple[VocoderWeights, Network]] = Prepared(
            lambda: (module,), self._make, lambda made: made[1].release()
        )
        self.calls = Switch(self.speak)

    @property
    def network(self) -> Network | None:
        """The network, with its graphs, where one is prepared."""
        return None if self.prepared.value is None else self.prepared.value[1]

    def prepare(self) -> str:
        """Read the weights as they are now; the remark for the report."""
        return self.prepared.renew()

    def remark(self) -> str:
        """How it computes, for the report."""
        return self.prepared.remark

    def release(self) -> None:
        """Give folded weights, buffers and graphs back."""
        self.prepared.release()

    def _make(self) -> tuple[tuple[VocoderWeights, Network], str]:
        device, remarks, function = self._module.conv_pre.bias.device, [], decode
        # 80 MB beside the originals save 10 ms of a second on a CPU, but sixty launches on a GPU
        pieces = in_pieces(self._section, self._ceiling, device)
        last = channels_last(self._section, self._ceiling, device)
        weights = vocoder_weights.read(self._module, device.type != "cpu", pieces, self._dtype, last)
        prepare(weights.network)
        if self._dtype is not None:
            remarks.append(f"residual blocks in {str(self._dtype).removeprefix('torch.')}")
        if last:
            remarks.append("channels last")
        if pieces:
            by_product = last and not why_no_kernels()
            remarks.append("upsampling by products" if by_product else "upsampling in pieces")
        if self._section.compile:
            function, reason = compiled(decode, device=device, dynamic=True)  # one for all lengths
            remarks.append(f"not compiled: {reason}" if reason else "compiled")
        wanted = self._section.graphs and device.type == "cuda"
        graphs = wanted and self._ceiling != "exact"
        if wanted:
            remarks.append("CUDA graphs" if graphs else 'no CUDA graphs: padded lengths are above fidelity = "exact"')
        network = Network(weights.network, not graphs, function, lambda: self.prepared.generation)
        return (weights, network), ", ".join(remarks)

    @torch.inference_mode()
    def speak(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples (B, n) and source (B, 1, n); arguments as upstream's ``inference``."""
        self._caches.before_vocoder(speech_feat.device, speech_feat.size(2))
        return synthesize(*self.prepared.current(), speech_feat, cache_source)

    @torch.inference_mode()
    def source(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> Tensor:
        """The source (B, 1, n) that ``speak`` returns beside the samples; draws the same random numbers."""
        return excite(self.prepared.current()[0], speech_feat, cache_source)

    @torch.inference_mode()
    def speak_all(self, mels: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
        """Samples (1, n) of several utterances (1, 80, T) in one batch, each from its ``source``."""
        return synthesize_all(*self.prepared.current(), mels, sources)

    def streamed(self, seed: int) -> streamed_vocoder.StreamedVocoder:
        """The vocoder of one utterance that is rendered in windows."""
        self.prepared.current()  # the part is on its device
        return streamed_vocoder.begin(self.prepared.current, self._module.conv_pre.bias.device, seed)
