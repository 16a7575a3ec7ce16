"""What a reference voice is measured by, on the model's device: mel spectrogram and speaker embedding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 32  # windows of the speaker encoder at once


class MelSpectrogram:
    """Log-mel spectrogram of a waveform, with filters and window kept once a device.

    Args:
        basis: mel filters (m, 1 + size/2) float32.
        size: samples of a frame, and of its Hann window.
        hop: samples from one frame to the next.
    """

    def __init__(self, basis: np.ndarray, size: int, hop: int):
        self._basis, self.size, self.hop = torch.from_numpy(basis).float(), size, hop
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, samples: Tensor | np.ndarray) -> Tensor:
        """Samples (b, n) or (n,) to (b, m, t) float32: the natural logarithm of magnitudes of at least 1e-5."""
        samples = torch.tensor(samples).float() if isinstance(samples, np.ndarray) else samples
        samples = torch.atleast_2d(samples)
        basis, window = self._on(samples.device)
        edge = (self.size - self.hop) // 2
        samples = F.pad(samples[:, None], (edge, edge), mode="reflect")[:, 0]
        spectrum = torch.stft(
            samples, self.size, self.hop, self.size, window, center=False, onesided=True, return_complex=True
        )
        magnitudes = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9)
        return torch.log(torch.clamp(torch.matmul(basis, magnitudes), min=1e-5))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:
            with torch.inference_mode(False):  # they outlive the call
                window = torch.hann_window(self.size, dtype=torch.float32, device="cpu")
                self._constants[device] = self._basis.to(device), window.to(device)
        return self._constants[device]


def speaker_embedding(
    encoder: Callable[[Tensor], Tensor], mel: Tensor, width: int, step: int, coverage: float, on_host: bool
) -> Tensor:
    """Mean embedding (1, e) of unit length of a recording's windows, as upstream's ``VoiceEncoder.inference``.

    Args:
        encoder: windows (b, width, m) to embeddings (b, e).
        mel: (t, m) float32, on the encoder's device.
        width, step: frames of a window, and from one to the next.
        coverage: the last window counts where frames fill at least this share of it.
        on_host: take the mean there, as upstream does; the last bit may differ between devices.
    """
    windows, rest = divmod(max(len(mel) - width + step, 0), step)
    if windows == 0 or (rest + width - step) / width >= coverage:
        windows += 1
    length = width + step * (windows - 1)
    mel = F.pad(mel, (0, 0, 0, max(length - len(mel), 0)))[:length]
    each = mel.unfold(0, width, step).transpose(1, 2).contiguous()
    embeddings = torch.cat([encoder(part) for part in each.chunk(-(-windows // BATCH))])
    mean = torch.mean(embeddings.cpu() if on_host else embeddings, dim=0, keepdim=True)
    return mean / torch.linalg.norm(mean, dim=1, keepdim=True)
