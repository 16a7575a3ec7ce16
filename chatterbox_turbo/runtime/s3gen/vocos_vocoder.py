"""Vocos computed: the package's layers over utterances of several lengths, and the inverse transform without a wait.

The package's own ``ISTFT`` asks the host on every call whether the sum of its windows is positive, and adds the windows
up by ``fold``; here the sum is known to be, and the windows are added hop by hop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.onednn import linear
from ..device.devices import on_device
from .frames import stacked
from .graphed import GraphedNetwork
from .vocos_network import VocosNetwork

CLIP = 1e2  # largest magnitude, as the package's head has it


def coefficients(network: VocosNetwork, mel: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, T, n_fft + 2) fp32: logarithmic magnitudes, then phases, of mel frames (B, bands, T) fp32.

    Args:
        valid: (B, 1, T) bool, the frames of each utterance; frames of ``mel`` behind them are 0. ``None`` where nothing
            is padding.
    """
    backbone = network.backbone
    x = _normalized(backbone.norm, backbone.embed(mel).transpose(1, 2))
    for block in backbone.convnext:
        # behind its end a convolution reads zeros, as it does where an utterance ends by itself
        h = x.transpose(1, 2)
        h = block.dwconv(h if valid is None else h * valid).transpose(1, 2)
        h = linear(_normalized(block.norm, h), block.pwconv1.weight, block.pwconv1.bias)
        h = linear(block.act(h), block.pwconv2.weight, block.pwconv2.bias)
        x = x + (h if block.gamma is None else h.mul_(block.gamma))
    x = _normalized(backbone.final_layer_norm, x)
    return linear(x, network.head.out.weight, network.head.out.bias)


def _normalized(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    # products want rows that lie together
    return norm(x.contiguous())


def samples_of(network: VocosNetwork, spectrum: Tensor, limit: float) -> Tensor:
    """Samples (B, hop T) fp32, at most ``limit``, of coefficients (B, T, n_fft + 2)."""
    hop, window = network.architecture.hop, network.head.istft.window
    magnitude, phase = spectrum.chunk(2, dim=-1)
    frames = torch.fft.irfft(torch.polar(magnitude.exp().clamp_(max=CLIP), phase), window.size(0), dim=-1)
    count, cut = frames.size(1) * hop, (window.size(0) - hop) // 2
    added = _overlapped(frames.mul_(window), hop)[:, cut : cut + count]
    weight = _overlapped(window.square().expand(1, frames.size(1), -1), hop)[:, cut : cut + count]
    return added.div_(weight).clamp_(-limit, limit)


def _overlapped(frames: Tensor, hop: int) -> Tensor:
    """(B, m): windows (B, T, n) added up, each ``hop`` samples behind the one before."""
    rows, count, size = frames.shape
    pieces = F.pad(frames, (0, -size % hop)).unflatten(2, (-1, hop))
    total = frames.new_zeros(rows, count + pieces.size(2) - 1, hop)
    for number in range(pieces.size(2)):
        total[:, number : number + count] += pieces[:, :, number]
    return total.flatten(1)


class VocosDecoder(GraphedNetwork):
    """``coefficients`` for one utterance or several; ``function`` is that, or what a compiler has made of it.

    Args:
        limit: largest absolute sample.
    """

    longest = 1024
    pays_after = 256  # a tenth of HiFT's kernels, so that a replay saves a tenth

    def __init__(
        self,
        network: VocosNetwork,
        limit: float,
        disable: bool = True,
        function: Callable[..., Tensor] = coefficients,
        addresses: Callable[[], Hashable] = lambda: (),
    ):
        super().__init__(network, disable, function, addresses)
        self._limit = limit

    def _run(self, key: tuple, mel: Tensor, *ends: Tensor) -> Tensor:
        valid = None
        if ends:
            valid = torch.arange(mel.size(2), device=mel.device)[None, None] < ends[0][:, None, None]
        return self._function(self.weights, mel, valid)

    def __call__(self, mel: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """(B, T, n_fft + 2) fp32; with graphs, a static buffer.

        Args:
            mel: (B, bands, T) fp32, zeros behind the end of an utterance.
            lengths: frames of each utterance; ``None`` where all have T. What comes behind them means nothing.
        """
        rows, frames = mel.size(0), mel.size(2)
        runner, total = self._choose(rows, frames)
        lengths, ends = lengths or [frames] * rows, ()
        if runner is self.runner or any(length < total for length in lengths):
            ends = (on_device(torch.tensor(list(lengths)), mel.device),)
        if total > frames:
            mel = F.pad(mel, (0, total - frames))
        return runner((total, rows, bool(ends)), mel, *ends)[:, :frames]

    def synthesize(self, mel: Tensor) -> Tensor:
        """Samples (B, hop T) fp32 of mel frames (B, bands, T) of any floating-point format."""
        return samples_of(self.weights, self(mel.float()), self._limit)

    def synthesize_all(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """Samples (1, hop T) of utterances (1, bands, T) of several lengths, the layers in one batch."""
        lengths = [mel.size(2) for mel in mels]
        spectra = self(stacked([mel.float() for mel in mels]), lengths)
        rows = (spectra[row : row + 1, :length] for row, length in enumerate(lengths))
        return [samples_of(self.weights, spectrum, self._limit) for spectrum in rows]


class StreamedVocos:
    """Samples of the windows of one utterance, from left to right; nothing is carried from one to the next.

    A sample depends on ``VocosArchitecture.reach`` mel frames on either side: where a window has those, its samples are
    the whole utterance's.

    Args:
        current: the decoder, asked for in every window.
    """

    def __init__(self, current: Callable[[], VocosDecoder]):
        self._current = current

    @torch.inference_mode()
    def __call__(self, mel: Tensor, first: int, known: int = 0) -> Tensor:
        """Samples (n,) of mel frames (1, bands, T); ``first`` and ``known`` as in ``StreamedVocoder``, unused."""
        return self._current().synthesize(mel)[0]
