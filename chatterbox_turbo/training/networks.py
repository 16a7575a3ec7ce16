"""What is trained: the Vocos, with its transform in fp32, and the discriminators of the package ``vocos``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from ..errors import ModelUnavailableError, describe
from ..runtime.s3gen.vocos_network import INSTALL, VocosNetwork

Judgement = tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[list[Tensor]]]


class Generator(nn.Module):
    """A Vocos under autocast: its backbone in the format of that, its inverse transform in fp32.

    There are no complex numbers in bf16, and a phase in it is off by a percent.
    """

    def __init__(self, network: VocosNetwork):
        super().__init__()
        self.network = network

    def forward(self, mel: Tensor) -> Tensor:
        """Samples (B, hop T) fp32 of mel frames (B, bands, T)."""
        states = self.network.backbone(mel)
        with torch.autocast(mel.device.type, enabled=False):
            return self.network.head(states.float())


class Discriminators(nn.Module):
    """Multi-period and multi-resolution discriminators as one module, so that one step updates both.

    Args:
        width: share of the channels that they have in the package.

    Raises:
        ModelUnavailableError: the package cannot be imported.
    """

    def __init__(self, width: float = 1.0):
        super().__init__()
        module = package("discriminators")
        self.periods, self.resolutions = module.MultiPeriodDiscriminator(), module.MultiResolutionDiscriminator()
        if width < 1:
            _narrow(self, width)

    def forward(self, real: Tensor, made: Tensor) -> tuple[Judgement, Judgement]:
        """What each kind says of samples (B, n): scores of real and made ones, and the features behind them."""
        return self.periods(real, made), self.resolutions(real, made)


def _narrow(module: nn.Module, width: float) -> None:
    """Every convolution replaced by one with a share of its channels; the signal's own and the score's stay."""

    def share(channels: int) -> int:
        return channels if channels <= 2 else max(2, round(channels * width))

    for name, layer in module.named_children():
        if not isinstance(layer, nn.Conv2d):
            _narrow(layer, width)
            continue
        made = nn.Conv2d(
            share(layer.in_channels), share(layer.out_channels), layer.kernel_size, layer.stride, layer.padding
        )
        module.add_module(name, weight_norm(made))


def package(name: str) -> Any:
    """A module of the package ``vocos``.

    Raises:
        ModelUnavailableError: it cannot be imported.
    """
    try:
        return import_module(f"vocos.{name}")
    except Exception as error:  # it imports torchaudio and encodec, which fail in their own ways
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "vocos"
        raise ModelUnavailableError(
            "The package vocos is not installed." if missing else f"The package vocos fails ({describe(error)}).",
            "Its discriminators and losses are what a Vocos is trained with.",
            f"Run: {INSTALL}",
        ) from error
