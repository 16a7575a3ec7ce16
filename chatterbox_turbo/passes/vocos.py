"""Vocos in HiFT's place: the vocoder's engine, its checkpoint, and what becomes of HiFT's weights meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import VocoderSection
from ..runtime.cpu import cold
from ..runtime.device.compilation import compiled
from ..runtime.device.offload import Place
from ..runtime.device.overlay import DevicePart
from ..runtime.loading.hub_folder import folder_of
from ..runtime.memory.clearing import CachePolicy
from ..runtime.s3gen import vocos_checkpoint
from ..runtime.s3gen.streaming import Windows
from ..runtime.s3gen.vocos_checkpoint import VocosCheckpoint
from ..runtime.s3gen.vocos_network import VocosNetwork, why_not_installed
from ..runtime.s3gen.vocos_vocoder import StreamedVocos, VocosDecoder, coefficients
from ..upstream import mel_frames, vocoder_weights
from ..upstream.prepared import Prepared
from .base import Context, Switch


def why_not(context: Context) -> str:
    """Why Vocos cannot run here; empty where it can. Of the checkpoint nothing but the description is read.

    Raises:
        ModelUnavailableError: the checkpoint is missing, damaged, or of other mel frames than the model's.
    """
    if reason := why_not_installed():
        return reason
    mel = mel_frames.describe(context.parts.s3gen)
    if mel is None:
        return "the code that makes the model's mel frames is not a known one, so that no checkpoint can be told to fit"
    folder, checkpoint = described(context.config.vocoder)
    vocos_checkpoint.check_mel(checkpoint, mel, folder)
    if Path(folder) == Path(context.config.vocoder.checkpoint).expanduser():
        vocos_checkpoint.check_weights(checkpoint, folder)
    return ""


def described(section: VocoderSection) -> tuple[Path, VocosCheckpoint]:
    """Folder and description of the checkpoint that a configuration names; a repository's weights stay where they are.

    Raises:
        ModelUnavailableError: it is missing or damaged.
    """
    folder = folder_of(section.checkpoint, [vocos_checkpoint.NAME])
    return folder, vocos_checkpoint.read_description(folder)


def put(context: Context) -> VocosVocoder:
    """Have HiFT's weights leave the memory, through the journal, and the checkpoint's network on the model's device.

    Raises:
        ModelUnavailableError: the weights are missing, damaged or of another architecture.
        TurboError: HiFT's weights cannot be written to a file.
    """
    section, device = context.config.vocoder, context.parts.device
    left = _leave(context)
    folder = folder_of(section.checkpoint, [vocos_checkpoint.NAME, vocos_checkpoint.WEIGHTS])
    network = vocos_checkpoint.load(folder, device)
    limit = vocoder_weights.limit_of(context.parts.s3gen.mel2wav)
    figures = vocos_checkpoint.read_description(folder).figures()
    return VocosVocoder(network, limit, section, context.caches, f"{figures}; {left}")


def hift_tensors(context: Context) -> list[Tensor]:
    """HiFT's parameters and buffers that leave: but for S3Gen's first, which tells the device of the model."""
    parts = context.parts
    first = next(parts.s3gen.parameters())
    every = (*parts.s3gen.mel2wav.parameters(), *parts.s3gen.mel2wav.buffers())
    return list({id(tensor): tensor for tensor in every if tensor is not first}.values())


def planned(context: Context) -> VocosCheckpoint | None:
    """The checkpoint's description where the plan has Vocos in HiFT's place, else ``None``."""
    wanted = context.config.vocoder.kind == "vocos" and "vocoder" in context.planned
    return described(context.config.vocoder)[1] if wanted else None


def why_hift_stays(context: Context) -> str:
    """Why HiFT's weights cannot leave the memory of this device; empty where they can."""
    device = context.parts.device
    if device.type == "cpu":
        return cold.why_not() or cold.spill_folder(context.config.offload.folder)[1]
    return "" if device.type == "cuda" else f"the memory of {device} is the host's"


def _leave(context: Context) -> str:
    """HiFT's weights to a mapped file or the host's memory; where they are, for the report."""
    if reason := why_hift_stays(context):
        return f"HiFT's weights stay: {reason}"
    tensors, device = hift_tensors(context), context.parts.device
    place: Place
    if device.type == "cuda":
        place, where = DevicePart(tensors, device), "host's memory"
        context.movable |= {id(tensor) for tensor in place.tensors}
    else:
        folder, _ = cold.spill_folder(context.config.offload.folder)
        place, where = cold.ColdPart(tensors, folder), "file"
    context.journal.record("HiFT's weights", place.restore)
    place.leave()
    return f"HiFT's {place.nbytes / 2**20:.1f} MiB of weights have left for the {where}"


class VocosVocoder:
    """Mel frames to samples in upstream's terms, as ``vocoder.Vocoder``, without pitch, source or random numbers.

    Args:
        network: on the model's device.
        limit: largest absolute sample.
        figures: of the checkpoint, and where HiFT's weights are, for the report.

    Attributes:
        reach: mel frames on either side that a sample depends on.
        windows: how an utterance is cut where its stream does not say.
    """

    def __init__(
        self, network: VocosNetwork, limit: float, section: VocoderSection, caches: CachePolicy, figures: str = ""
    ):
        self._network, self._limit, self._figures = network, limit, figures
        self._section, self._caches = section, caches
        self.reach = network.architecture.reach
        # what lies beyond two thirds of the reach is 89 dB below, or less (docs/vocoder.md)
        self.windows = Windows(held=-(-2 * self.reach // 3))
        self.prepared: Prepared[VocosDecoder] = Prepared(
            lambda: (network,), self._make, lambda decoder: decoder.release()
        )
        self.calls = Switch(self.speak)

    @property
    def network(self) -> VocosDecoder | None:
        """The decoder, with its graphs, where one is prepared."""
        return self.prepared.value

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers: what may leave the device's memory."""
        return [*self._network.parameters(), *self._network.buffers()]

    def prepare(self) -> str:
        """Make the decoder; the remark for the report."""
        self.prepared.renew()
        return self.remark()

    def remark(self) -> str:
        """What computes, by which figures, for the report."""
        size = self._network.architecture
        nbytes = sum(tensor.nbytes for tensor in self.tensors)
        head = f"Vocos ({size.layers} layers, {size.dim} wide, {nbytes / 2**20:.1f} MiB) in HiFT's place"
        return "; ".join(filter(None, (head, self.prepared.remark, self._figures)))

    def release(self) -> None:
        """Give buffers and graphs back."""
        self.prepared.release()

    def _make(self) -> tuple[VocosDecoder, str]:
        device, remarks, function = self._network.head.out.bias.device, [], coefficients
        if self._section.compile:
            function, reason = compiled(coefficients, device=device, dynamic=True)  # one for all lengths
            remarks.append(f"not compiled: {reason}" if reason else "compiled")
        graphs = self._section.graphs and device.type == "cuda"
        remarks += ["CUDA graphs"] if graphs else []
        decoder = VocosDecoder(self._network, self._limit, not graphs, function, lambda: self.prepared.generation)
        return decoder, ", ".join(remarks)

    @torch.inference_mode()
    def speak(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples (B, n), and (B, 1, n) zeros in the place of the source; arguments as upstream's ``inference``.

        ``cache_source`` changes nothing: there is no source.
        """
        self._caches.before_vocoder(speech_feat.device, speech_feat.size(2))
        samples = self.prepared.current().synthesize(speech_feat)
        return samples, torch.zeros_like(samples)[:, None]

    def source(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> Tensor:
        """(B, 1, 0): none is needed, and no random number is drawn."""
        return speech_feat.new_zeros(speech_feat.size(0), 1, 0)

    @torch.inference_mode()
    def speak_all(self, mels: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
        """Samples (1, n) of several utterances (1, bands, T) in one batch."""
        return self.prepared.current().synthesize_all(mels)

    def streamed(self, seed: int) -> StreamedVocos:
        """The vocoder of one utterance that is rendered in windows; the seed changes nothing."""
        return StreamedVocos(self.prepared.current)
