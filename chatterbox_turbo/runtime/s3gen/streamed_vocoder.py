"""HiFT over windows of an utterance: the source of harmonics goes on where the window before has left it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .drawn import Drawn, seeded
from .vocoder import Source, VocoderWeights, harmonics, pitch_of, random_phases, samples_of, turns_of
from .vocoder_network import Network

# Mel frames on either side that a value depends on. Pitch: five convolutions of three frames. Samples: HiFT's own
# convolutions, from the mel frames or from the source (``tests/test_streaming_acoustics.py`` derives both).
PITCH_REACH, SAMPLE_REACH = 5, 15
UNIT = 10  # frames whose noise is drawn at once


class StreamedVocoder:
    """Samples of the windows of one utterance, from left to right.

    The phase of each harmonic and the noise beside it are those of the utterance, not of a window: the source equals
    that of the whole but for the pitch of the last ``PITCH_REACH`` frames of a window, which lack what comes behind
    them. Such frames are computed anew in the next window, unless they count as known there.

    Args:
        current: the weights and their network, asked for in every window.
        phases: (1, harmonics, 1), of ``vocoder.random_phases``.
        noise: normal numbers (1, harmonics, n), one a sample and sine.
    """

    def __init__(self, current: Callable[[], tuple[VocoderWeights, Network]], phases: Tensor, noise: Drawn):
        self._current, self._phases, self._noise = current, phases, noise
        # turns of each sine before a frame, and pitch and source of the last window
        self._frame, self._turned = 0, 0.0
        self._first, self._pitch, self._source = 0, phases.new_zeros(1, 0), phases.new_zeros(1, 1, 0)

    @torch.inference_mode()
    def __call__(self, mel: Tensor, first: int, known: int = 0) -> Tensor:
        """Samples (n,) of mel frames (1, 80, T) fp32.

        Args:
            first: number of the first frame in the utterance.
            known: frames at the beginning whose source is the one of the windows before, which must have had them.
        """
        weights, network = self._current()
        source, begin = weights.source, first + known
        scale = source.scale
        pitch = pitch_of(weights, mel)
        turned = self._turned_before(source, begin)
        each = pitch[:, known:].repeat_interleave(scale, dim=-1)
        new = turned + torch.cumsum(turns_of(source, each), dim=-1, dtype=_exact(mel.device))
        noise = self._noise.between(begin * scale, (first + mel.size(2)) * scale)
        made = harmonics(source, each, new.float(), self._phases, noise)
        at = (first - self._first) * scale
        signal = torch.cat([self._source[..., at : at + known * scale], made], dim=-1)
        samples = samples_of(weights, network, mel, signal)[0]
        self._noise.forget(begin * scale)
        self._frame, self._turned = begin, turned
        self._first, self._pitch, self._source = first, pitch, signal
        return samples

    def _turned_before(self, source: Source, frame: int) -> Tensor:
        """(1, harmonics, 1): turns of each sine before a frame."""
        at = self._frame - self._first
        turns = turns_of(source, self._pitch[:, at : at + frame - self._frame]).to(_exact(self._phases.device))
        # as torch sums up a whole utterance; what single precision does to long ones is upstream's
        return self._turned + turns.sum(dim=-1, keepdim=True) * source.scale


def begin(current: Callable[[], tuple[VocoderWeights, Network]], device: torch.device, seed: int) -> StreamedVocoder:
    """The vocoder of a new utterance, with the random numbers of a seed."""
    source = current()[0].source
    phases = random_phases(source, 1, device, torch.Generator().manual_seed(seed))
    return StreamedVocoder(current, phases, seeded(source.harmonics, UNIT * source.scale, device, seed))


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
