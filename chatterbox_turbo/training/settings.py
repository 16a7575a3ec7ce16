"""What decides the weights of a training run: the same settings and the same data give the same ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InvalidRequestError, brief
from ..runtime.s3gen.vocos_network import VocosArchitecture

PRECISIONS = ("no", "bf16", "fp16")
SHORTEST, LONGEST = 32, 8192  # samples of a window of the mel loss


@dataclass(frozen=True)
class TrainingSettings:
    """Defaults are the Vocos paper's (arXiv 2306.00814 and its code), but for the length of a segment.

    Attributes:
        steps: of generator and discriminators each; the learning rates follow a cosine to 0 at their end.
        batch: segments a step, over all processes.
        frames: mel frames of a segment. The network looks ``VocosArchitecture.reach`` frames to either side, so that
            shorter segments than twice that are mostly edges.
        learning_rate, warmup: of both AdamW optimizers, and steps over which it rises.
        mel_weight: of the mel reconstruction loss.
        mel_windows: samples of its windows, with a quarter as hop and 100 bands for each 1024; their mean counts.
            The paper has 1024 alone; several resolutions are BigVGAN's (arXiv 2206.04658, its second version).
        s3gen_mel_weight: of the distance between S3Gen's own log-mel frames of what is made and of the target: what the
            network is given it should give back. The paper has none.
        resolution_weight: of the multi-resolution discriminators' losses, beside the multi-period ones'.
        mel_only_steps: steps at the start without discriminators.
        discriminator_width: share of the channels that the package's discriminators have.
        dim, intermediate_dim, layers: of the network, as ``VocosArchitecture``.
        precision: ``"no"`` (fp32), ``"bf16"`` or ``"fp16"``: of convolutions and products; transforms stay in fp32.
        seed: of initial weights, the order of files, places in them and gains.
        validate_every, save_every: steps.
    """

    steps: int = 1_000_000
    batch: int = 16
    frames: int = 64
    learning_rate: float = 5e-4
    warmup: int = 0
    mel_weight: float = 45.0
    mel_windows: tuple[int, ...] = (1024,)
    s3gen_mel_weight: float = 0.0
    resolution_weight: float = 0.1
    mel_only_steps: int = 0
    discriminator_width: float = 1.0
    dim: int = 512
    intermediate_dim: int = 1536
    layers: int = 8
    precision: str = "no"
    seed: int = 0
    validate_every: int = 1000
    save_every: int = 500

    def __post_init__(self) -> None:
        least = {"seed": 0, "warmup": 0, "mel_only_steps": 0, "frames": 3}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise InvalidRequestError(f"{field.name} is {brief(value)}, expected a whole number.")
            if field.type == "int" and value < least.get(field.name, 1):
                raise InvalidRequestError(f"{field.name} is {value}, expected at least {least.get(field.name, 1)}.")
            if field.type == "float" and not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise InvalidRequestError(f"{field.name} is {brief(value)}, expected a number of at least 0.")
        if not 0 < self.discriminator_width <= 1:
            raise InvalidRequestError(f"discriminator_width is {self.discriminator_width}, expected: above 0, up to 1.")
        if not self.mel_windows or any(isinstance(w, bool) or not isinstance(w, int) for w in self.mel_windows):
            raise InvalidRequestError(f"mel_windows is {brief(self.mel_windows)}, expected whole numbers.")
        if not all(SHORTEST <= window <= LONGEST for window in self.mel_windows):
            raise InvalidRequestError(
                f"mel_windows is {brief(self.mel_windows)}, expected numbers of {SHORTEST} to {LONGEST} samples."
            )
        if self.precision not in PRECISIONS:
            raise InvalidRequestError(f"precision is {brief(self.precision)}, expected one of {', '.join(PRECISIONS)}.")

    def architecture(self, n_fft: int, hop: int) -> VocosArchitecture:
        """The network's."""
        return VocosArchitecture(self.dim, self.intermediate_dim, self.layers, n_fft, hop)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)
