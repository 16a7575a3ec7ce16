"""Vocos (2023): mel frames to samples by ConvNeXt blocks at the frames' rate and one inverse short-time transform.

The layers are those of the package ``vocos``, imported when a network is first built.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ...errors import ModelUnavailableError, describe

INSTALL = 'pip install "chatterbox-turbo[vocos]"'
KERNEL = 7  # frames of each convolution of the package's backbone


@dataclass(frozen=True)
class MelDescription:
    """What a vocoder's mel frames are: two vocoders understand each other's where all of it is equal.

    Attributes:
        sample_rate: samples a second.
        bands: of the mel filters.
        hop, window, n_fft: samples from frame to frame, of the (Hann) window, and of the transform.
        fmin, fmax: Hz of the lowest and the highest filter's end.
        log: base of the logarithm: ``"e"`` or ``"10"``.
        floor: what magnitudes are raised to before it.
        centre: whether frame 0 is centred on sample 0 (torch's ``center=True``) instead of on the middle of the first
            hop, by padding the signal with (n_fft - hop) / 2 samples on either side.
        padding: how the signal goes on beyond its ends.
        power: of the magnitudes that the filters add up.
        scale, norm: of the filters, by librosa's names; ``norm`` is ``"none"`` where their peaks are 1.
    """

    sample_rate: int
    bands: int
    hop: int
    window: int
    n_fft: int
    fmin: float
    fmax: float
    log: str = "e"
    floor: float = 1e-5
    centre: bool = False
    padding: str = "reflect"
    power: float = 1.0
    scale: str = "slaney"
    norm: str = "slaney"

    def beside(self, other: MelDescription, own: str, others: str) -> str:
        """Both as a table, what differs marked; ``own`` and ``others`` are the titles of the columns."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        rows = [("", own, others), *((name, _text(a), _text(b)) for name, a, b in pairs)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        marks = ["", *("" if a == b else "  <- differs" for _, a, b in pairs)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join((line + mark).rstrip() for line, mark in zip(lines, marks, strict=True))


@dataclass(frozen=True)
class VocosArchitecture:
    """The size of a Vocos; the defaults are the published one at the transform of S3Gen's mel frames.

    Attributes:
        dim, intermediate_dim: channels of the blocks, and between their two products.
        layers: number of blocks.
        n_fft, hop: samples of the inverse transform's window, and from frame to frame.
        padding: ``"same"``: ``hop`` samples a frame.
    """

    dim: int = 512
    intermediate_dim: int = 1536
    layers: int = 8
    n_fft: int = 1920
    hop: int = 480
    padding: str = "same"

    @property
    def convolution_reach(self) -> int:
        """Mel frames on either side that the coefficients of a frame depend on."""
        return (self.layers + 1) * (KERNEL // 2)

    @property
    def reach(self) -> int:
        """Mel frames on either side that the samples of a frame depend on."""
        # a sample lies in the windows of as many frames, half of them on either side of its own
        return self.convolution_reach + -(-(self.n_fft - self.hop) // 2 // self.hop)


class VocosNetwork(nn.Module):
    """Backbone and head of the package ``vocos`` as one module.

    Args:
        architecture: its size.
        mel: what it is given; ``bands`` is the number of input channels.

    Attributes:
        backbone: ``vocos.models.VocosBackbone``: (B, bands, T) to (B, T, dim).
        head: ``vocos.heads.ISTFTHead``: (B, T, dim) to samples.

    Raises:
        ModelUnavailableError: the package ``vocos`` cannot be imported.
    """

    def __init__(self, architecture: VocosArchitecture, mel: MelDescription):
        super().__init__()
        models, heads = _package()
        self.architecture, self.mel = architecture, mel
        size = asdict(architecture)
        self.backbone = models.VocosBackbone(mel.bands, size["dim"], size["intermediate_dim"], size["layers"])
        self.head = heads.ISTFTHead(size["dim"], size["n_fft"], size["hop"], size["padding"])

    def forward(self, mel: Tensor) -> Tensor:
        """Samples (B, hop T) fp32 of mel frames (B, bands, T) fp32."""
        return self.head(self.backbone(mel))


def build(architecture: VocosArchitecture, mel: MelDescription) -> VocosNetwork:
    """A network with the package's initial values, drawn from torch's global generator, on the CPU, in training mode.

    Raises:
        ModelUnavailableError: the package ``vocos`` cannot be imported.
    """
    return VocosNetwork(architecture, mel)


def why_not_installed() -> str:
    """Why the package cannot be imported, with the remedy; empty where it can."""
    try:
        _package()
    except ModelUnavailableError as error:
        return " ".join(part.rstrip(".") for part in (f"{error.what}".rstrip(".") + ";", error.remedy))
    return ""


def _package() -> tuple[Any, Any]:
    try:
        import_module("vocos")
        return import_module("vocos.models"), import_module("vocos.heads")
    except Exception as error:  # it imports torchaudio and encodec, which fail in their own ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == "vocos"
        raise ModelUnavailableError(
            "The package vocos is not installed." if missing else f"The package vocos fails ({describe(error)}).",
            "Its layers are what a Vocos vocoder is made of.",
            f"Run: {INSTALL}",
        ) from error


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
