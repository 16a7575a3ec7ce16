"""PerTh's watermarker: telling the real one from a stand-in, and observing it without writing to it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import wrapt

from ..patching import BoundToModel
from ..runtime.device.devices import download, upload
from ..runtime.voice.resampling import Resampler

REMEDY = "pip install 'setuptools<81' (PerTh needs pkg_resources), then load the model again"


def why_not_perth(watermarker: Any) -> str:
    """Why outputs of this watermarker carry no PerTh mark; empty for the real one."""
    if watermarker is None:
        return f"the model has no watermarker: {REMEDY}"
    network = getattr(watermarker, "perth_net", None)
    if network is None or not hasattr(network, "encoder") or not hasattr(network, "decoder"):
        kind = f"{type(watermarker).__module__}.{type(watermarker).__qualname__}"
        return f"the model's watermarker is a {kind}, not PerTh's: its outputs carry no PerTh watermark"
    return ""


def why_not_observed(model: Any) -> str:
    """Why this model's watermarker cannot be watched; empty where it can."""
    attribute = inspect.getattr_static(type(model), "watermarker", None)
    if isinstance(attribute, property) and attribute.fset is None:
        return f"{type(model).__name__}.watermarker is a property that cannot be set"
    return ""


class ObservedWatermarker(BoundToModel, wrapt.ObjectProxy):
    """A watermarker whose ``apply_watermark`` goes through ``around(apply, signal, sample_rate, options)``.

    A proxy on the model rather than a patch on the watermarker, because servers share one watermarker between
    models; type checks and attribute access reach the real object.
    """

    def __init__(self, watermarker: Any, around: Callable[[Callable, Any, int, dict], Any]):
        super().__init__(watermarker)
        self._self_around = around

    def apply_watermark(self, signal: Any, sample_rate: int, **options: Any) -> Any:
        """Signal (n,) float32 in, marked signal (n,) float32 out, both at ``sample_rate`` Hz."""
        if self._self_around is None:
            return self.__wrapped__.apply_watermark(signal, sample_rate=sample_rate, **options)
        return self._self_around(self.__wrapped__.apply_watermark, signal, sample_rate, options)

    def make_inert(self) -> None:
        """From now on, calls go to the watermarker as if this were not there."""
        self._self_around = None


def observed(watermarker: Any) -> Any:
    """The watermarker itself, behind everything that looks on."""
    while isinstance(watermarker, wrapt.ObjectProxy):
        watermarker = watermarker.__wrapped__
    return watermarker


class MarkingOnDevice:
    """PerTh's ``apply_watermark`` for audio of one rate, computed on a device by a copy of what it needs (9 MiB).

    A copy, because servers share one watermarker between models: the network stays where it is. Resampling, spectra,
    PerTh's encoder and its inverse run without a transfer in between, in PerTh's own modules.

    The samples come from the host, where ``generate`` has put them: 768 KB for 8 s of speech, little beside what made
    them. The same samples are on the device still, but to find them there ``s3gen.inference`` would have to be
    patched, and what it returned compared with what is handed in.

    Within fp32 rounding of PerTh's samples (126 dB SNR), with one reservation: in digital silence PerTh's network sees
    the rounding errors of soxr, and marks what is within 0.2 s of it by them (54 dB in speech with gaps of zeros, of
    which models leave 20 ms at the start).

    Args:
        watermarker: PerTh's, or what observes it.
        sample_rate: of the audio, in Hz.
        device: where to compute.
    """

    def __init__(self, watermarker: Any, sample_rate: int, device: torch.device):
        network = watermarker.perth_net
        own_rate = network.hp.sample_rate
        self.device = device
        self._to_own_rate = Resampler(sample_rate, own_rate, device)
        self._from_own_rate = Resampler(own_rate, sample_rate, device)
        self._spectrum = copy.deepcopy(network.ap).to(device)
        self._encoder = copy.deepcopy(network.encoder).to(device)

    def __call__(self, signal: np.ndarray) -> np.ndarray:
        """Finite samples (n,), float32 or float64, to marked ones (m,) float32: as many as PerTh gives, m <= n.

        Raises:
            RuntimeError: PerTh's, for less than 32 ms of audio.
        """
        samples = self._to_own_rate(upload(signal, self.device))
        magnitudes, phase = self._spectrum.signal_to_magphase(samples)
        marked, _ = self._encoder(magnitudes[None])
        return download(self._from_own_rate(self._spectrum.magphase_to_signal(marked[0], phase)))
