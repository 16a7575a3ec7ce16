"""``bench``: speed and memory of upstream and optimized, interleaved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import Wanted, load_model, request_for
from .machine import provenance, summary
from .matrix import matrix as side_by_side
from .options import ModelName, SizeName
from .screen import Screen, table

if TYPE_CHECKING:
    from ..measure.benchmark import Benchmark, Metric, Range
    from ..measure.gpu import Findings

TITLES = {
    "t3": "T3, prefill included",
    "t3_step": "T3, a token",
    "conditionals": "reference voice",
    "flow": "flow matching",
    "vocoder": "vocoder",
    "watermark": "watermark",
    "end_to_end": "end to end",
    "real_time_factor": "real-time factor",
    "peak_memory": "peak memory",
    "bandwidth_share": "share of memory bandwidth",
}


def bench(
    context: typer.Context,
    model: options.Model = ModelName.english,
    size: options.Size = SizeName.full,
    runs: Annotated[int | None, typer.Option("--runs", min=1, help="Pairs of runs: 3; with --matrix 1.")] = None,
    text: Annotated[str, typer.Option("--text", help="What to say.")] = options.TEXT,
    voice: options.Voice = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    stop_after: options.StopAfter = None,
    synthetic: options.Synthetic = False,
    checkpoint: options.Checkpoint = None,
    json: options.Json = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Many configurations, each in its own process.")] = False,
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--presets", help="Rows of --matrix: fast,low_vram+sequential; all presets where left out, none: upstream."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", dir_okay=False, help="PNG of --matrix: speed against memory.")
    ] = None,
) -> None:
    """Measure speed and memory of both.

    Upstream and optimized take turns in one process; prints medians and ratios.

    With --matrix: memory, speed and quality of upstream, every preset, and the file in --config, each in a process of
    its own that takes turns with upstream's. A row is a preset, with what is added behind a +: idle, sequential or
    adaptive (offload), discard (original weights), trim (freed memory), autocast.

    A full-size model takes about a minute a run on two CPU cores: shorten it with --stop-after, or --size tiny
    to see that it works.
    """
    screen = options.screen_of(context)
    if json not in (None, "-"):
        options.check_writable(Path(json))
    if matrix:
        if preset is not None:
            raise typer.BadParameter("--preset is for two sides; choose the rows of --matrix with --presets.")
        wanted = Wanted(model.value, options.device_named(device), size.value, stop_after, synthetic, checkpoint)
        side_by_side(screen, wanted, presets or [], config, text, voice, seed, runs or 1, json, plot)
        return
    if presets or plot:
        raise typer.BadParameter("--presets and --plot are for --matrix.")
    with screen.step("importing torch"), screen.quiet():
        from ..measure import benchmark
    settings = options.configuration(screen, preset, config)
    wanted = Wanted(model.value, options.device_named(device), size.value, stop_after, synthetic, checkpoint)
    loaded = load_model(screen, wanted)
    request = request_for(loaded.model, text, voice=voice)
    with screen.step("measuring"), screen.quiet():
        result = benchmark.measure(loaded.model, settings, request, seed, runs or 3, announce=screen.announce)
    gpus = on_gpu(screen, loaded.model, settings, request, seed)
    data = {
        **provenance(screen.arguments),
        "model": {"family": model.value, "size": size.value, "device": wanted.device, "weights": loaded.description},
        "request": {**request, "seed": seed},
        "config": settings.model_dump(),
        **result.to_dict(),
        "gpu": [found.to_dict() for found in gpus],
    }
    if json is not None:
        screen.write_json(data, json)
    if json != "-":
        print_benchmark(screen, data, result)
        for found in gpus:
            print_findings(screen, found)


def on_gpu(screen: Screen, model: Any, settings: Any, request: dict[str, Any], seed: int = 0) -> list[Findings]:
    """What only a GPU can tell of a model that is on one."""
    from ..upstream.families import device_of

    if device_of(model).type != "cuda":
        return []
    from ..measure.gpu import examine

    with screen.step("looking at the GPU"), screen.quiet():
        return [examine(model, settings, request, seed)]


def print_findings(screen: Screen, found: Findings) -> None:
    """Below the tables, as text that can be sent."""
    screen.print()
    for line in found.lines():
        screen.print(line)


def print_benchmark(screen: Screen, data: dict[str, Any], result: Benchmark) -> None:
    """Where, what, the table, and what the figures mean."""
    last = result.pairs[-1][1]
    screen.print(data["command"])
    screen.print(summary(data))
    screen.print(f"model: {data['model']['family']} on {data['model']['device']}, {data['model']['weights']}")
    passes = ", ".join(result.plan.running) or "none"
    screen.print(f"passes: {passes}; applied in {max(result.apply_seconds):.2f} s (not part of a run)")
    for note in result.notes:
        screen.print(f"note: {note}")
    tokens = f"{last.tokens} tokens, " if last.tokens else ""
    screen.print(f"speech: {tokens}{last.audio_seconds:.2f} s; {len(result.pairs)} pairs of runs, median (min-max)")
    screen.print()
    screen.print(metrics_table(result.metrics))
    screen.print()
    if result.unmatched:
        screen.print(f"not timed on both sides: {', '.join(result.unmatched)}")
    screen.print(agreement(result))
    speeds = [run.bandwidth / 1e9 for pair in result.pairs for run in pair if run.bandwidth]
    if speeds:
        read = " against ".join(f"{run.bytes_per_token / 2**20:.0f}" for run in result.pairs[-1])
        screen.print(
            f"bandwidth: T3 reads {read} MiB of weights a token; "
            f"before each run the memory gave {min(speeds):.1f}-{max(speeds):.1f} GB/s"
        )
    if last.sample.wav.device.type == "cpu" and data["model"]["device"] == "cpu":
        screen.print("peak memory is the resident set of the one process that both sides run in")


def metrics_table(metrics: list[Metric]) -> Any:
    """Upstream, optimized and ratio, one row a figure."""
    rows = table("", "", "upstream", "optimized", "ratio")
    for metric in metrics:
        ratio = f"{metric.ratio:.2f}x" if metric.name != "bandwidth_share" else ""
        sides = (_range(metric.upstream, metric), _range(metric.optimized, metric))
        rows.add_row(TITLES[metric.name], *sides, ratio)
    return rows


def agreement(result: Benchmark) -> str:
    """Whether both sides said the same, in one line."""
    comparison = result.comparison
    tokens = f"{comparison.token_agreement:.1%} of the speech tokens agree; " if result.pairs[-1][1].tokens else ""
    mark = "detected" if comparison.watermarked else "NOT DETECTED"
    return f"{tokens}samples: {samples(comparison.snr_db)}; watermark {mark}"


def samples(snr_db: float) -> str:
    """A signal-to-noise ratio in words where it is infinite."""
    words = {float("inf"): "identical", float("-inf"): "of another length"}
    return words.get(snr_db) or f"{snr_db:.0f} dB SNR"


def _range(values: Range, metric: Metric) -> str:
    if metric.name == "bandwidth_share":
        return f"{values.median:.0%}"
    digits = 0 if metric.unit == "MiB" else 1 if values.median >= 10 else 3
    spread = f" ({values.min:.{digits}f}-{values.max:.{digits}f})" if values.min != values.max else ""
    return f"{values.median:.{digits}f} {metric.unit}".strip() + spread
