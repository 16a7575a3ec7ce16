"""One step of training: discriminators on what the generator makes now, then the generator on what they say of it.

Losses and weights are those of the Vocos paper (arXiv 2306.00814) by the package's own classes. Its code makes the same
samples anew for the generator's half; here they are made once, which is the same, for the generator has not changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import TrainingError
from .networks import Discriminators, Generator, package
from .settings import TrainingSettings

BETAS = (0.8, 0.9)
HALVES = ("generator", "discriminators")
BANDS = 100  # of the mel loss for a window of 1024 samples


class Training:
    """Networks, optimizers and losses on an accelerator.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        network: a ``VocosNetwork`` in training mode.
        mel: samples (B, n) to the log-mel frames that the network is given; differentiable.

    Attributes:
        modules: ``Generator`` and ``Discriminators`` by name, as accelerate has wrapped them.
        optimizers: likewise.
    """

    def __init__(
        self,
        accelerator: Any,
        settings: TrainingSettings,
        network: nn.Module,
        rate: int,
        mel: Callable[[Tensor], Tensor],
    ):
        self.accelerator, self.settings, self._mel = accelerator, settings, mel
        losses = package("loss")
        made = {"generator": Generator(network), "discriminators": Discriminators(settings.discriminator_width)}
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        for name, module in made.items():
            module = module.to(accelerator.device)
            optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, betas=BETAS, fused=True)
            self.modules[name], self.optimizers[name] = accelerator.prepare(module, optimizer)
        bands = [(window, round(BANDS * window / 1024)) for window in settings.mel_windows]
        distances = [losses.MelSpecReconstructionLoss(rate, window, window // 4, count) for window, count in bands]
        self._mel_losses = nn.ModuleList(distances).to(accelerator.device)
        self._judged, self._fooled = losses.DiscriminatorLoss(), losses.GeneratorLoss()
        self._features = losses.FeatureMatchingLoss()

    def module(self, name: str) -> nn.Module:
        """A module without what distributes it."""
        return self.accelerator.unwrap_model(self.modules[name])

    def step(
        self, number: int, mel: Tensor, samples: Tensor, target: Tensor | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Losses, and seconds of either half, of the step of this number, counted from 0.

        Args:
            mel: (B, bands, T) fp32.
            samples: (B, hop T) fp32.
            target: mel frames of ``samples`` where they are there already, as ``mel`` is for recordings.

        Raises:
            TrainingError: a loss is no finite number; no weight has been changed by it.
        """
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.settings.rate_at(number)
        losses: dict[str, float] = {}
        clock = _Clock(self.accelerator.device)
        made = self.modules["generator"](mel)
        clock.add("generator")
        if number >= self.settings.mel_only_steps:
            self._update("discriminators", lambda: self._of_discriminators(samples, made.detach()), losses, number)
            clock.add("discriminators")
        self._update("generator", lambda: self._of_generator(samples, target, made, number), losses, number)
        clock.add("generator")
        return losses, clock.seconds

    def _update(self, half: str, terms: Callable[[], dict[str, Tensor]], told: dict[str, float], number: int) -> None:
        """One optimizer's step by the sum of weighted losses."""
        found = terms()
        total = sum(found.values())
        # one wait for the device; a loss that is none must not reach the weights
        values = torch.stack([total.detach().reshape(()), *(v.detach().reshape(()) for v in found.values())]).tolist()
        told |= dict(zip((f"{half}: total", *found), values, strict=True))
        # all processes stop together: one alone would leave the others waiting
        good = self._everywhere(all(map(math.isfinite, values)))
        if not good:
            bad = (
                ", ".join(name for name, value in told.items() if not math.isfinite(value)) or "one of another process"
            )
            raise TrainingError(
                f"Step {number + 1} has a loss that is no finite number: {bad}.",
                "Nothing has been changed by it; the state that was saved before stays.",
                "Begin another run with a lower learning rate, or with --precision no where it was another.",
            )
        self.optimizers[half].zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        self.optimizers[half].step()

    def _everywhere(self, good: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return good
        flag = torch.tensor([float(good)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item() == self.accelerator.num_processes)

    def _of_discriminators(self, samples: Tensor, made: Tensor) -> dict[str, Tensor]:
        terms = {}
        for name, weight, judgement in self._judgements(self.modules["discriminators"], samples, made):
            loss, parts, _ = self._judged(judgement[0], judgement[1])
            terms[f"{name}: told apart"] = weight * loss.squeeze() / len(parts)
        return terms

    def _of_generator(self, samples: Tensor, target: Tensor | None, made: Tensor, number: int) -> dict[str, Tensor]:
        distances = [distance(made, samples) for distance in self._mel_losses]
        terms = {"mel": self.settings.mel_weight * sum(distances) / len(distances)}
        if self.settings.s3gen_mel_weight:
            # upstream's function logs a warning for louder samples; the gradient is of what was made
            clipped = made + (made.clamp(-1, 1) - made).detach()
            target = self._mel(samples) if target is None else target
            terms["S3Gen's mel"] = self.settings.s3gen_mel_weight * functional.l1_loss(self._mel(clipped), target)
        if number < self.settings.mel_only_steps:
            return terms
        # without what distributes them, and without gradients of their own: this half changes the generator alone
        judges = self.module("discriminators").requires_grad_(False)
        for name, weight, judgement in self._judgements(judges, samples, made):
            loss, parts = self._fooled(judgement[1])
            terms[f"{name}: fooled"] = weight * loss.squeeze() / len(parts)
            matched = self._features(judgement[2], judgement[3]).squeeze()
            terms[f"{name}: features"] = weight * matched / len(judgement[2])
        judges.requires_grad_(True)
        return terms

    def _judgements(self, judges: nn.Module, samples: Tensor, made: Tensor) -> list[tuple[str, float, Any]]:
        periods, resolutions = judges(samples, made)
        return [("periods", 1.0, periods), ("resolutions", self.settings.resolution_weight, resolutions)]


class _Clock:
    """Seconds since the last look, by name; the device has finished what it was given before."""

    def __init__(self, device: torch.device):
        self._device, self.seconds = device, dict.fromkeys(HALVES, 0.0)
        self._last = time.perf_counter()

    def add(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now
