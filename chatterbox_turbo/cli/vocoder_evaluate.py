"""``vocoder evaluate``: HiFT, a Vocos and Griffin-Lim beside the recordings whose mel frames they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .loading import Wanted, load_model
from .options import Audio, ModelName
from .progress import progress_bar
from .screen import Screen, table


def evaluate(
    context: typer.Context,
    audio: Audio,
    vocoder: Annotated[
        Path | None, typer.Option("--vocoder", exists=True, file_okay=False, help="A Vocos checkpoint's folder.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for WAVs, spectrograms.png and evaluation.json.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Recordings at most.")] = 16,
    seconds: Annotated[float, typer.Option("--seconds", min=0.2, help="Of each at most.")] = 6.0,
    model: options.Model = ModelName.english,
    checkpoint: options.Checkpoint = None,
    synthetic: options.Synthetic = False,
    size: options.SizeByWeights = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """HiFT, a Vocos and Griffin-Lim beside the recordings whose mel frames they are given.

    Distances are of unmarked samples; the WAVs carry PerTh's watermark.
    """
    screen = options.screen_of(context)
    if json not in (None, "-"):
        options.check_writable(Path(json))
    if output is not None:
        _check_folder(output)
    with screen.step("importing torch"), screen.quiet():
        import torch

        from ..measure import vocoders
        from ..runtime.s3gen import vocos_checkpoint
        from ..training.recordings import find
        from ..training.segments import chosen
        from ..upstream.families import identify
        from ..upstream.mel_function import mel_function

        mel = mel_function()[1]
    recordings = find(audio)
    if vocoder is not None:
        vocos_checkpoint.check_mel(vocos_checkpoint.read_description(vocoder), mel, vocoder)
    wanted = Wanted(
        model.value,
        options.device_named(device),
        options.size_for(size, checkpoint),
        None,
        synthetic,
        checkpoint,
        False,
    )
    loaded = load_model(screen, wanted)
    parts = identify(loaded.model)
    samples, left_out = chosen(recordings, count, int(seconds * mel.sample_rate), mel.sample_rate, mel.hop)
    for name, reason in left_out.items():
        screen.note(f"left out: {name}: {reason}")
    network = None if vocoder is None else vocos_checkpoint.load(vocoder, parts.device)
    rows = vocoders.vocoders(parts, network, mel)
    with progress_bar(screen, "evaluating", len(samples)) as told, screen.quiet(bars=True):
        torch.manual_seed(seed)  # HiFT draws random numbers
        result = vocoders.evaluate(
            parts, samples, rows, mel, progress=lambda done: told(done, f"{done} of {len(samples)} recordings")
        )
    shown = table(f"{result.count} recordings, {result.seconds:.0f} s; {loaded.description}", "", *result.figures)
    for column in vocoders.COLUMNS:
        shown.add_row(column, *(_cell(column, figures.get(column)) for figures in result.figures.values()))
    tell = screen.note if json == "-" else screen.print  # standard output is the JSON alone
    tell(shown)
    data = {"recordings": result.count, "seconds": result.seconds, "weights": loaded.description}
    data |= {"vocoder": None if vocoder is None else str(vocoder), "rows": result.figures}
    if output is not None:
        _write(screen, output, result.heard, mel.sample_rate, data)
        tell(f"written to {output}")
    if json is not None:
        screen.write_json(data, json)


def _check_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {output}: {error.strerror or error}.") from None
    options.check_writable(output / "evaluation.json")


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0%}" if column == "watermark found" else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _write(screen: Screen, output: Path, heard: list[dict[str, Any]], rate: int, data: dict[str, Any]) -> None:
    import soundfile

    for number, rows in enumerate(heard):
        for name, samples in rows.items():
            soundfile.write(output / f"{number}-{name.lower()}.wav", samples, rate, subtype="PCM_16")
    screen.write_json(data, str(output / "evaluation.json"))
    try:
        from .vocoder_plot import draw

        draw(output / "spectrograms.png", heard[0], rate, "one recording, and what vocoders make of its mel frames")
    except ImportError:
        screen.note('no picture: pip install "chatterbox-turbo[plot]"')
