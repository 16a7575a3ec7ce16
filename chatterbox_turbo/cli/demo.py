"""``demo``: upstream and optimized side by side, with files to listen to and to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .bench import TITLES, agreement, metrics_table
from .loading import Wanted, load_model, request_for
from .machine import provenance, summary, version
from .options import ModelName, SizeName
from .screen import Screen

if TYPE_CHECKING:
    from ..measure.benchmark import Benchmark

FILES = {
    "upstream": "upstream.wav",
    "optimized": "optimized.wav",
    "picture": "comparison.png",
    "report": "report.json",
}
TOKENS = 75  # 3 s of speech, so that a full-size model on two cores is done within minutes
NO_MATPLOTLIB = "no picture: matplotlib is not installed (pip install 'chatterbox-turbo[plot]')"
BARS = ("conditionals", "flow", "vocoder", "watermark", "end_to_end")  # of the picture, in seconds


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="Folder for the results.")] = Path("out/demo"),
    model: options.Model = ModelName.english,
    text: Annotated[str, typer.Option("--text", help="What to say.")] = options.TEXT,
    seed: options.Seed = 0,
    voice: options.Voice = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    size: options.Size = SizeName.full,
    synthetic: options.Synthetic = False,
    stop_after: options.StopAfter = None,
) -> None:
    """Run upstream and optimized side by side.

    Both speak the same text with the same seed and voice. Writes both WAVs, a picture and a report. Uses the real
    weights where they are cached or can be downloaded, otherwise random ones, and says which.
    """
    screen = options.screen_of(context)
    if not text.strip():
        raise typer.BadParameter("the text is empty.")
    out.mkdir(parents=True, exist_ok=True)
    files = {name: options.check_writable(out / file) for name, file in FILES.items()}
    if not version("matplotlib"):
        del files["picture"]
    with screen.step("importing torch"), screen.quiet():
        from ..measure import benchmark
    settings = options.configuration(screen, preset, config)
    long = size is SizeName.full and model is not ModelName.vc
    wanted = Wanted(
        model.value,
        options.device_named(device),
        size.value,
        stop_after,
        synthetic,
        default_stop=TOKENS if long else None,
    )
    loaded = load_model(screen, wanted)
    screen.note(f"model: {loaded.description}")
    request = request_for(loaded.model, text, voice=voice)
    with screen.step("generating"), screen.quiet():
        result = benchmark.measure(
            loaded.model, settings, request, seed, 1, warm_up_both=False, bandwidth=False, announce=screen.announce
        )
    data = {
        **provenance(screen.arguments),
        "model": {"family": model.value, "size": size.value, "device": wanted.device, "weights": loaded.description},
        "synthetic": loaded.kind == "synthetic",
        "request": {**request, "seed": seed},
        "config": settings.model_dump(),
        **result.to_dict(),
        "watermarked": watermarks(loaded.model, result),
        "files": {name: path.name for name, path in files.items()},
    }
    _write(screen, files, data, result, loaded.model.sr)
    _print(screen, files, data, result)
    if not all(data["watermarked"].values()):
        raise typer.Exit(1)


def watermarks(model: Any, result: Benchmark) -> dict[str, bool]:
    """Whether PerTh's detector finds its mark, by side."""
    from ..passes.watermark import detected
    from ..upstream.families import identify

    perth = identify(model).watermarker
    sides = zip(("upstream", "optimized"), result.pairs[0], strict=True)
    return {side: detected(perth, run.sample.wav, model.sr) for side, run in sides}


def _write(screen: Screen, files: dict[str, Path], data: dict[str, Any], result: Benchmark, rate: int) -> None:
    import soundfile

    waves = {}
    for side, run in zip(("upstream", "optimized"), result.pairs[0], strict=True):
        waves[side] = run.sample.wav.squeeze(0).cpu().numpy()
        soundfile.write(files[side], waves[side], rate)
    if "picture" in files:
        from .plot import draw, ratio

        pairs = {m.name: (m.upstream.median, m.optimized.median) for m in result.metrics}
        t3 = tuple(run.sample.phases.get("t3", 0.0) for run in result.pairs[0])
        seconds = {"T3, all tokens": t3} if all(t3) else {}
        seconds |= {TITLES[name]: pairs[name] for name in BARS if name in pairs}
        model = data["model"]
        weights = "synthetic" if data["synthetic"] else "real"
        title = f"{model['family']}, {weights} weights ({model['size']}), {model['device']}, one run each: "
        title += f"{ratio(*pairs['end_to_end'])} end to end"
        with screen.step("drawing"), screen.quiet():
            draw(files["picture"], waves, rate, pairs.get("t3_step"), seconds, title)
    screen.write_json(data, str(files["report"]))


def _print(screen: Screen, files: dict[str, Path], data: dict[str, Any], result: Benchmark) -> None:
    upstream, optimized = result.pairs[0]
    weights = data["model"]["weights"]
    screen.print(summary(data))
    screen.print(f"model: {data['model']['family']} on {data['model']['device']}, {weights}")
    screen.print(str(result.plan))
    for note in result.notes:
        screen.print(f"note: {note}")
    screen.print()
    screen.print(metrics_table(result.metrics))
    screen.print()
    screen.print(agreement(result))
    marks = ", ".join(f"{side} {'yes' if found else 'NO'}" for side, found in data["watermarked"].items())
    screen.print(f"watermark detected: {marks}")
    tokens = f"{upstream.tokens} and {optimized.tokens} tokens, " if upstream.tokens else ""
    lengths = f"{upstream.audio_seconds:.2f} and {optimized.audio_seconds:.2f} s of speech"
    screen.print(f"upstream and optimized: {tokens}{lengths}; one run each, so a ratio near 1 may be chance: see bench")
    screen.print(f"written to {files['report'].parent}: {', '.join(path.name for path in files.values())}")
    if "picture" not in files:
        screen.print(NO_MATPLOTLIB)
