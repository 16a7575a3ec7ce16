"""The loop: batches, steps, validations, states; killed anywhere, the same call goes on to the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidRequestError, ModelUnavailableError, TrainingError
from ..runtime.s3gen.vocos_network import MelDescription, VocosNetwork, build
from . import picture
from .networks import package
from .segments import Batch, Batches, Source, batches
from .settings import TrainingSettings
from .state import History, RunFolder
from .step import Training
from .validation import best, keep_best_and, validate, write_checkpoint, write_samples

TOLD_EVERY = 10  # steps from one line of the history to the next
INSTALL = 'pip install "chatterbox-turbo[vocos-train]"'
LEFT_OUT_TOLD = 20  # files of no use that are told one by one


@dataclass(frozen=True)
class Progress:
    """What a run says of itself: after ``step`` steps, ``text`` in words."""

    step: int
    text: str


@dataclass(frozen=True)
class TrainingResult:
    """How a run has ended.

    Attributes:
        step: steps that are done.
        finished: whether all are.
        checkpoint: the best vocoder checkpoint, or ``None`` where nothing has been validated yet.
        validation: figures of the last validation by name.
        seconds: of a step, by part, over this call; empty where it has made none.
    """

    step: int
    finished: bool
    checkpoint: Path | None
    validation: Mapping[str, float]
    seconds: Mapping[str, float]


def train(
    folder: Path,
    source: Source,
    settings: TrainingSettings,
    mel: tuple[Callable[[Tensor], Tensor], MelDescription],
    *,
    initial: VocosNetwork | None = None,
    data: Mapping[str, Any] | None = None,
    device: str = "cpu",
    workers: int = 0,
    progress: Callable[[Progress], None] = lambda one: None,
    note: Callable[[str], None] = lambda text: None,
    stopping: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train a Vocos, or go on with the run in a folder.

    On one CPU with the same number of threads the weights are the same to the bit however often the run was killed.
    Under ``accelerate launch`` (or torchrun) several processes share each batch.

    Args:
        folder: of the run; made where it is missing (``state`` has what is in it).
        mel: what ``upstream.mel_function`` gives.
        initial: begin with its weights, not with random ones; it is trained itself.
        data: plain values that say what the source and ``initial`` are; a run goes on with the same ones only.
        device: ``"cpu"``, or what accelerate finds.
        workers: processes that read recordings; they change nothing but the time.
        stopping: asked after each step; a true answer saves the state and ends the call.

    Raises:
        TrainingError: the folder is another run's, the data are of no use, a loss is no number, the disk is full.
        ModelUnavailableError: the packages ``vocos`` or ``accelerate`` are missing.
        InvalidRequestError: the batch cannot be shared by so many processes; ``initial`` is of another architecture.
    """
    function, description = mel
    for name in ("discriminators", "loss"):  # before anything is written
        package(name)
    accelerator, own = _accelerator(settings.precision, device)
    try:
        if settings.batch % accelerator.num_processes:
            raise InvalidRequestError(
                f"A batch of {settings.batch} cannot be shared by {accelerator.num_processes} processes.",
                "",
                "Choose a multiple.",
            )
        if max(settings.mel_windows) >= 2 * settings.frames * description.hop:
            raise InvalidRequestError(
                f"A window of {max(settings.mel_windows)} samples does not fit into twice {settings.frames} frames.",
                f"A frame is {description.hop} samples.",
                "Choose shorter mel_windows or more frames.",
            )
        architecture = settings.architecture(description.n_fft, description.hop)
        if initial is not None and (initial.architecture, initial.mel) != (architecture, description):
            raise InvalidRequestError(
                f"The network to begin with is {initial.architecture}.",
                f"What is to be trained is {architecture}.",
                "Choose the same sizes.",
            )
        run = _Run(RunFolder(folder), source, settings, function, description, accelerator, progress, note)
        return run.go(initial, data or {}, workers, stopping)
    finally:
        if own:
            _forget(accelerator)


class _Run:
    """One call of ``train``."""

    def __init__(
        self,
        folder: RunFolder,
        source: Source,
        settings: TrainingSettings,
        mel: Callable[[Tensor], Tensor],
        description: MelDescription,
        accelerator: Any,
        progress: Callable[[Progress], None],
        note: Callable[[str], None],
    ):
        self.folder, self.source, self.settings, self.mel, self.description = folder, source, settings, mel, description
        self.accelerator, self.main, self.progress, self.note = accelerator, accelerator.is_main_process, progress, note
        self.left_out: set[str] = set()
        self.figures: dict[str, float] = {}

    def go(
        self, initial: VocosNetwork | None, data: Mapping[str, Any], workers: int, stopping: Callable[[], bool]
    ) -> TrainingResult:
        settings, rate = self.settings, self.description.sample_rate
        self.held = self.source.held_out()  # where there is none, nothing is written
        if self.main:
            self.folder.open(settings.to_dict(), data)
        self.accelerator.wait_for_everyone()
        architecture = settings.architecture(self.description.n_fft, self.description.hop)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = build(architecture, self.description) if initial is None else initial.requires_grad_().train()
            training = Training(self.accelerator, settings, network, rate, self.mel)
        for segment in self.held:
            self._tell(segment.left_out)
        step = self.folder.restore(training)
        if step and self.main:
            self.note(f"going on after step {step:,}")
        self.history = History(self.folder.path / "history.jsonl", step) if self.main else None
        self.figures = next((line["validation"] for line in reversed(self._lines()) if "validation" in line), {})
        step, seconds = self._steps(training, step, workers, stopping)
        return TrainingResult(step, step >= settings.steps, best(self.folder), self.figures, seconds)

    def _steps(
        self, training: Training, step: int, workers: int, stopping: Callable[[], bool]
    ) -> tuple[int, dict[str, float]]:
        settings, accelerator = self.settings, self.accelerator
        dataset = Batches(self.source, settings.batch, accelerator.process_index, accelerator.num_processes)
        total, count = dict.fromkeys(picture.PARTS, 0.0), 0
        began = time.perf_counter()
        self.progress(Progress(step, "starting"))
        for batch in batches(dataset, step, settings.steps, workers):
            mel, samples = self._ready(batch)
            seconds = {"data": time.perf_counter() - began}
            try:
                losses, halves = training.step(step, mel, samples, mel if batch.mel is None else None)
            except TrainingError as error:
                some = ", ".join(dict.fromkeys(batch.names))
                raise TrainingError(error.what, f"Its segments are of {some}. {error.why}", error.remedy) from error
            seconds |= halves
            step, count = step + 1, count + 1
            total = {part: total[part] + seconds[part] for part in total}
            self._tell(batch.left_out)
            last, stop = step >= settings.steps, self._agreed(stopping())
            if self.main and (step % TOLD_EVERY == 0 or step == 1 or last):
                self.history.add(step=step, losses=losses, seconds=seconds)
            self.progress(Progress(step, self._words(step, losses, seconds)))
            validated = last or step % settings.validate_every == 0
            if validated:
                self._validate(training, step)
            if validated or stop or step % settings.save_every == 0:
                accelerator.wait_for_everyone()
                if self.main:
                    self.folder.save(training, step)
            if stop:
                break
            began = time.perf_counter()
        return step, {part: value / count for part, value in total.items()} if count else {}

    def _ready(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mel frames and samples of a batch on the device."""
        samples = batch.samples.to(self.accelerator.device)
        if batch.mel is not None:
            return batch.mel.to(samples.device), samples
        with torch.no_grad():
            return self.mel(samples), samples

    def _validate(self, training: Training, step: int) -> None:
        self.accelerator.wait_for_everyone()
        if not self.main:
            return
        self.progress(Progress(step, "validating"))
        network, rate = training.module("generator").network, self.description.sample_rate
        self.figures, made = validate(network, self.held, self.mel, rate, self.accelerator.device)
        self.history.add(step=step, validation=self.figures)
        write_samples(self.folder, step, self.held, made, rate)
        facts = {"steps": step, "data": self.source.describe(), "settings": self.settings.to_dict()}
        facts["versions"] = {name: version(name) for name in ("torch", "vocos")}
        write_checkpoint(self.folder, step, network, self.figures, facts)
        keep_best_and(self.folder, step)
        try:
            picture.draw(self.folder.path / "curves.png", self._lines(), f"{self.folder.path.name}: {facts['data']}")
        except ImportError:
            self.note('no picture of the curves: pip install "chatterbox-turbo[plot]"')
        told = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        self.note(f"step {step:,}: {told}")

    def _lines(self) -> list[dict[str, Any]]:
        return [] if self.history is None else self.history.lines

    def _words(self, step: int, losses: Mapping[str, float], seconds: Mapping[str, float]) -> str:
        times = ", ".join(f"{part} {1000 * value:.0f} ms" for part, value in seconds.items())
        mel = losses["mel"] / self.settings.mel_weight if self.settings.mel_weight else losses["mel"]
        return f"step {step:,} of {self.settings.steps:,}, mel loss {mel:.3f}, {times}"

    def _tell(self, left_out: Mapping[str, str]) -> None:
        for name, reason in left_out.items():
            if self.main and name not in self.left_out:
                self.left_out.add(name)
                if len(self.left_out) <= LEFT_OUT_TOLD:
                    self.note(f"left out: {name}: {reason}")
                elif len(self.left_out) == LEFT_OUT_TOLD + 1:
                    self.note("more files are left out, and not told any more")

    def _agreed(self, stop: bool) -> bool:
        """Whether any process was asked to stop: all end after the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor([float(stop)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())


def _accelerator(precision: str, device: str) -> tuple[Any, bool]:
    """An ``Accelerator``, and whether this process had none before."""
    try:
        from accelerate import Accelerator
        from accelerate.state import is_initialized
    except ImportError as error:
        raise ModelUnavailableError(
            "The package accelerate is not installed.", "Training runs on it.", f"Run: {INSTALL}"
        ) from error
    own = not is_initialized()
    if precision == "fp16" and device == "cpu":
        raise InvalidRequestError(
            "precision is fp16, and the device a CPU.", "Its gradients need a GPU's scaling.", "Use no or bf16."
        )
    try:
        return Accelerator(mixed_precision=precision, cpu=device == "cpu"), own
    except ValueError as error:  # another precision than the process has already
        raise InvalidRequestError(f"precision {precision!r} is not to be had on {device}: {error}.") from error


def _forget(accelerator: Any) -> None:
    """Another run of this process may ask for another precision, which accelerate refuses while it knows this one."""
    if accelerator.num_processes == 1:
        accelerator.state._reset_state(reset_partial_state=True)
