"""``vocoder train``: a Vocos of one's own, on recordings or on a model's speech; ``evaluate`` is another file."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import Wanted, load_model
from .options import Audio, ModelName, SizeName
from .progress import progress_bar
from .screen import Screen
from .vocoder_evaluate import evaluate

if TYPE_CHECKING:
    from ..training.recordings import Recordings
    from ..training.segments import Source
    from ..training.settings import TrainingSettings

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="A Vocos vocoder: train, evaluate.")
SYNTHETIC = "synthetic"
HELD_SECONDS = 4.0  # of each recording that is validated on


class PrecisionName(str, Enum):
    """Precisions of ``training.settings``; a test compares the two."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


@app.command()
def train(
    context: typer.Context,
    audio: Audio,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run; the same command goes on in it.")],
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="FOLDER", help=f"Train on what a model says: its checkpoint folder, or '{SYNTHETIC}'."
        ),
    ] = None,
    teacher_items: Annotated[int, typer.Option("--teacher-items", min=2, help="Utterances of the teacher.")] = 2000,
    model: Annotated[ModelName, typer.Option("--model", help="The teacher's.")] = ModelName.english,
    size: options.SizeByWeights = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="The learning rate reaches 0 there.")] = 1_000_000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Segments a step, over all devices.")] = 16,
    frames: Annotated[int, typer.Option("--frames", min=3, help="Mel frames of a segment, 50 a second.")] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0.0)] = 5e-4,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps until the learning rate is reached.")] = 0,
    mel_only_steps: Annotated[
        int, typer.Option("--mel-only-steps", min=0, help="Steps at the start without discriminators.")
    ] = 0,
    mel_window: Annotated[
        list[int] | None,
        typer.Option("--mel-window", help="Samples of a window of the mel loss; repeat it for several. Default: 1024."),
    ] = None,
    s3gen_mel_weight: Annotated[
        float,
        typer.Option("--s3gen-mel-weight", min=0.0, help="Of a loss by S3Gen's own mel; published: 0."),
    ] = 0.0,
    discriminator_width: Annotated[
        float, typer.Option("--discriminator-width", help="Share of their channels; 1 is published.")
    ] = 1.0,
    begin_with: Annotated[
        Path | None,
        typer.Option(
            "--begin-with", metavar="FOLDER", help="A vocoder checkpoint, whose weights and sizes it begins with."
        ),
    ] = None,
    dim: Annotated[int, typer.Option("--dim", min=1, help="Channels of the network.")] = 512,
    intermediate_dim: Annotated[int | None, typer.Option("--intermediate-dim", min=1, help="Default: 3 dim.")] = None,
    layers: Annotated[int, typer.Option("--layers", min=1)] = 8,
    precision: Annotated[PrecisionName, typer.Option("--precision", help="no: fp32.")] = PrecisionName.no,
    device: options.Device = "auto",
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that read recordings.")] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    validate_every: Annotated[int, typer.Option("--validate-every", min=1, help="Steps.")] = 1000,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps.")] = 500,
) -> None:
    """Train a Vocos in HiFT's place.

    Interrupted (Ctrl-C, SIGTERM, kill -9, a full disk), the same command goes on. Several devices: accelerate launch -m
    chatterbox_turbo.cli vocoder train ... OUTPUT/checkpoints gets vocoders for vocoder.checkpoint, with their figures.
    """
    screen = options.screen_of(context)
    with screen.step("importing torch and chatterbox-tts"), screen.quiet():
        from ..runtime.s3gen import vocos_checkpoint
        from ..training.settings import TrainingSettings
        from ..training.trainer import Progress
        from ..training.trainer import train as run
        from ..upstream.mel_function import mel_function

        mel = mel_function()
    initial = None
    if begin_with is not None:
        initial = vocos_checkpoint.load(begin_with)
        own = initial.architecture
        dim, intermediate_dim, layers = own.dim, own.intermediate_dim, own.layers
    settings = TrainingSettings(
        steps=steps,
        batch=batch,
        frames=frames,
        learning_rate=learning_rate,
        warmup=warmup,
        mel_only_steps=mel_only_steps,
        mel_windows=tuple(mel_window or (1024,)),
        s3gen_mel_weight=s3gen_mel_weight,
        discriminator_width=discriminator_width,
        dim=dim,
        intermediate_dim=intermediate_dim or 3 * dim,
        layers=layers,
        precision=precision.value,
        seed=seed,
        validate_every=validate_every,
        save_every=save_every,
    )
    device = options.device_named(device)
    wanted = None if teacher is None else _teacher(teacher, model.value, size, device)
    with _stopping() as stopping:
        recordings = _recordings(screen, audio, output)
        if wanted is None:
            source = _recorded(recordings, settings, mel[1])
        else:
            source = _taught(screen, recordings, output, teacher_items, wanted, settings, mel[1], stopping)
        if source is None:
            raise typer.Abort
        data = {"audio": str(audio.resolve()), "files": len(recordings.names), "teacher": wanted and _identity(wanted)}
        if begin_with is not None:
            data["begin_with"] = vocos_checkpoint.read_description(begin_with).sha256
        with progress_bar(screen, "training", steps) as told, screen.quiet(bars=True):

            def tell(now: Progress) -> None:
                told(now.step, now.text)

            result = run(
                output, source, settings, mel, initial=initial, data=data, device=device, workers=workers,
                progress=tell, note=screen.note, stopping=stopping,
            )  # fmt: skip
    screen.print(f"{result.step:,} steps on {source.describe()}")
    _tell(screen, result, output)


def _tell(screen: Screen, result: Any, output: Path) -> None:
    if result.seconds:
        parts = ", ".join(f"{part} {1000 * value:.0f} ms" for part, value in result.seconds.items())
        screen.print(f"a step: {parts}")
    for name, value in result.validation.items():
        screen.print(f"{name}: {value:.4g}")
    if result.checkpoint is not None:
        screen.print(f'best checkpoint: {result.checkpoint} (vocoder.kind = "vocos", vocoder.checkpoint = …)')
    if not result.finished:
        screen.note(f"stopped after step {result.step:,}; the same command goes on in {output}")
        raise typer.Abort


def _recordings(screen: Screen, audio: Path, output: Path) -> Recordings:
    """Those of the folder, or those that the run began with."""
    from ..training.recordings import Recordings, find
    from ..training.state import RUN, full_disk, read_json, write_json
    from ..training.teacher import NAME as TEACHER

    known = output / "recordings.json"
    # what was drawn from before; until something has been, files may come and go
    if known.is_file() and any((output / name).is_file() for name in (RUN, f"teacher/{TEACHER}")):
        return Recordings(audio, tuple(read_json(known)["names"]))
    with screen.step("looking for recordings"):
        found = find(audio)
    with full_disk("begin"):
        output.mkdir(parents=True, exist_ok=True)
        # in somebody else's folder nothing is written: ``train`` refuses it
        if known.is_file() or not any(output.iterdir()):
            write_json(known, {"names": list(found.names)})
    return found


def _recorded(recordings: Recordings, settings: TrainingSettings, mel: Any) -> Source:
    from ..training.segments import RecordedSegments

    held = int(HELD_SECONDS * mel.sample_rate)
    return RecordedSegments(recordings, settings.seed, settings.frames * mel.hop, mel.sample_rate, mel.hop, held)


def _teacher(teacher: str, family: str, size: SizeName | None, device: str) -> Wanted:
    folder = None if teacher == SYNTHETIC else Path(teacher)
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"--teacher {teacher}: neither a checkpoint folder nor '{SYNTHETIC}'.")
    return Wanted(family, device, options.size_for(size, folder), None, folder is None, folder, False)


def _identity(wanted: Wanted) -> str:
    """Which teacher it is, wherever it runs."""
    return f"{wanted.family}, {wanted.checkpoint.resolve() if wanted.checkpoint else f'synthetic {wanted.size}'}"


def _taught(
    screen: Screen,
    recordings: Recordings,
    output: Path,
    items: int,
    wanted: Wanted,
    settings: TrainingSettings,
    mel: Any,
    stopping: Callable[[], bool],
) -> Source | None:
    """The teacher's data, made where they are missing; ``None`` where that was interrupted."""
    from ..api import apply
    from ..training.teacher import TeacherData

    data = TeacherData(output / "teacher", recordings, items, settings.seed, mel.sample_rate, mel.hop)
    if not data.complete(_identity(wanted)):
        teacher = load_model(screen, wanted).model
        with screen.step("preparing the teacher"), screen.quiet():
            apply(teacher)
        with progress_bar(screen, "teacher", items) as told, screen.quiet(bars=True):
            if not data.make(teacher, _identity(wanted), told, stopping):
                return None
    return data.segments(settings.seed, settings.frames, int(HELD_SECONDS * mel.sample_rate) // mel.hop)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """In the body the first Ctrl-C or SIGTERM asks for an end after the step that runs; the second one is as ever."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for each, old in before.items():
            signal.signal(each, old)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # signals are another thread's
        before.clear()
    try:
        yield lambda: bool(asked)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


app.command()(evaluate)
