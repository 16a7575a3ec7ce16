"""``bench --matrix``: memory, speed and quality of many configurations, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options
from .loading import Source, Wanted, source_of
from .machine import provenance, summary, version
from .progress import ended_by_sigterm
from .screen import Screen, table

if TYPE_CHECKING:
    from ..config import OptimizationConfig
    from ..measure.matrix import Row

UPSTREAM = "upstream"
AUTOCAST = "autocast"
# What a row may add to a preset, by the word behind the +.
ADDITIONS: dict[str, dict[str, Any]] = {
    "idle": {"offload": {"mode": "idle"}},
    "sequential": {"offload": {"mode": "sequential"}},
    "adaptive": {"offload": {"mode": "adaptive"}},
    "discard": {"precision": {"originals": "discard"}},
    "trim": {"memory": {"profile": "aggressive"}},
    AUTOCAST: {"fidelity": "lossy", "precision": {"autocast": "bfloat16"}},
}
EXTRA = (f"auto+{AUTOCAST}",)  # rows that no preset is, and that a table ought to have


def matrix(
    screen: Screen,
    wanted: Wanted,
    names: list[str],
    config: Path | None,
    text: str,
    voice: Path | None,
    seed: int,
    runs: int,
    json: str | None,
    plot: Path | None,
) -> None:
    """Measure the rows, and show what there is of them, also where that is interrupted."""
    rows = rows_named(names, config, screen.debug)
    if plot is not None:
        options.check_writable(plot)
        if not version("matplotlib"):
            raise typer.BadParameter("--plot needs matplotlib: pip install 'chatterbox-turbo[plot]'.")
    measured: list[Row] = []
    interrupted = False
    with ended_by_sigterm(), source_of(screen, wanted) as (source, description):
        request = _request(wanted.family, text, voice)
        data = {
            **provenance(screen.arguments),
            "model": {"family": wanted.family, "size": wanted.size, "device": wanted.device, "weights": description},
            "request": {**request, "seed": seed},
        }
        screen.note(f"model: {description}")
        try:
            _measure(screen, source, request, seed, rows, runs, measured, lambda: _save(screen, json, data, measured))
        except KeyboardInterrupt:
            interrupted = True
    data["interrupted"] = interrupted
    if measured:
        if plot is not None:
            _draw(screen, plot, data, measured)
        _save(screen, json, data, measured, last=True)
    if json != "-":
        print_matrix(screen, data, measured)
    if interrupted:
        screen.error(f"interrupted after {len(measured)} of {len(rows)} rows.")
        raise typer.Exit(130)
    if not any(row.runs for row in measured):
        raise typer.Exit(1)


def rows_named(names: list[str], file: Path | None, debug: bool = False) -> dict[str, OptimizationConfig | None]:
    """Configurations by name, upstream (``None``) first.

    Args:
        names: presets, each with additions behind a +; by default all presets, and ``EXTRA``; ``upstream`` alone: none.
        file: one more row.

    Raises:
        typer.BadParameter: an unknown addition.
        InvalidConfigError: an unknown preset, or what a file or an addition contradicts.
    """
    from ..config import OptimizationConfig, resolve
    from ..config.presets import PRESETS

    wanted = [part.strip() for name in names for part in name.split(",") if part.strip()]
    rows: dict[str, OptimizationConfig | None] = {UPSTREAM: None}
    for name in wanted or [*PRESETS, *EXTRA]:
        preset, *added = name.split("+")
        if name == UPSTREAM:
            continue
        for one in added:
            if one not in ADDITIONS:
                raise typer.BadParameter(f"unknown addition {one!r} in {name}: there are {', '.join(ADDITIONS)}.")
        config = resolve(preset)  # names the nearest where there is none
        if added:
            values: dict[str, Any] = {"preset": preset}
            for one in added:
                values = _joined(values, ADDITIONS[one])
            config = OptimizationConfig.from_values(values, f"the row {name}", environment=True)
        rows[name] = config
    if file is not None:
        rows[file.name] = resolve(file)
    quiet = (lambda c: c) if debug else partial(options.with_progress, progress="off")
    return {name: config and quiet(config) for name, config in rows.items()}


def _joined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(below)
    for key, value in above.items():
        joined[key] = {**joined.get(key, {}), **value} if isinstance(value, dict) else value
    return joined


def _request(family: str, text: str, voice: Path | None) -> dict[str, Any]:
    from .. import synthetic

    if family == "vc":
        request = {"audio": str(synthetic.reference_voice())}
    else:
        request = {"text": text, **({"language_id": "en"} if family == "multilingual" else {})}
    if voice is not None:
        request["target_voice_path" if family == "vc" else "audio_prompt_path"] = str(voice)
    return request


def _measure(screen, source: Source, request, seed, rows, runs, measured: list[Row], save) -> None:
    with screen.step("importing torch"), screen.quiet():
        from ..measure.matrix import Matrix
        from ..measure.worker import Job

    def job(config: OptimizationConfig | None) -> Job:
        load = partial(source.load, own=config is None)
        return Job(source.imports, load, config, request, seed, source.device, screen.debug)

    with screen.step("measuring"), Matrix(job, runs, screen.announce) as processes:
        for row in processes.rows(rows):
            measured.append(row)
            save()
            if row.failure:
                screen.note(f"{row.name}: {row.failure}")


def _save(screen: Screen, path: str | None, data: dict[str, Any], rows: list[Row], last: bool = False) -> None:
    """What there is so far; standard output gets it once."""
    if path is not None and (last or path != "-"):
        screen.write_json({**data, "rows": [row.to_dict() for row in rows]}, path)


def _draw(screen: Screen, path: Path, data: dict[str, Any], rows: list[Row]) -> None:
    from .matrix_plot import Point, draw

    points = [
        Point(row.name, row.resident / 1e9, row.peak / 1e9, row.speed, row.promise or UPSTREAM)
        for row in rows
        if row.peak is not None and row.speed is not None
    ]
    model = data["model"]
    folder = model["weights"].removeprefix("weights from ")
    kind = "synthetic weights" if model["weights"].startswith("SYNTHETIC") else "real weights"
    if folder != model["weights"]:  # of a checkpoint nobody here knows what it is
        kind = f"weights from {Path(folder).name}"
    with screen.step("drawing"), screen.quiet() if not screen.debug else nullcontext():
        draw(path, points, f"{model['family']} on {model['device']}, {kind} ({model['size']})")


def print_matrix(screen: Screen, data: dict[str, Any], rows: list[Row]) -> None:
    """Where, what, the table, and what its columns mean."""
    screen.print(data["command"])
    screen.print(summary(data))
    model = data["model"]
    screen.print(f"model: {model['family']} on {model['device']}, {model['weights']}")
    said = next((run for row in rows for run in row.runs), None)
    if said:
        tokens = f"{said['tokens']} tokens, " if said["tokens"] else ""
        screen.print(f"speech: {tokens}{said['audio_seconds']:.2f} s; {len(rows[0].runs)} runs each, medians")
    screen.print()
    screen.print(matrix_table(rows))
    screen.print()
    for line in legend(model["device"], rows):
        screen.print(line)
    for row in rows:
        for note in filter(None, (row.failure, *row.notes)):
            screen.print(f"{row.name}: {note}")


def matrix_table(rows: list[Row]) -> Any:
    """A line a configuration."""
    every = table("", "", "GB", "peak", "RTF", "speed", "promise", "top-1", "KL", "SNR dB")
    for row in rows:
        if not row.runs:
            every.add_row(row.name, "failed")
            continue
        speed = f"{row.speed:.2f}x" if row.speed else ""
        cells = (f"{row.resident / 1e9:.2f}", f"{row.peak / 1e9:.2f}", f"{row.real_time_factor:.2f}", speed)
        every.add_row(row.name, *cells, row.promise or "", *_quality(row.quality))
    return every


def _quality(found: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    t3, snr = found["divergence"], found["snr_db"]
    agreement, kl = (f"{t3['agreement']:.1%}", f"{max(t3['mean'], 0):.0e}") if t3 else ("", "")
    noise = {float("inf"): "equal", float("-inf"): "length"}.get(snr) or f"{snr:.0f}"
    return agreement, kl, noise


def legend(device: str, rows: list[Row]) -> list[str]:
    """What the columns are."""
    speaks = any(row.quality and row.quality["divergence"] for row in rows)
    if device.startswith("cpu"):
        imports = max((row.imports for row in rows), default=0) / 1e9
        what = f"resident memory of a process of its own, without the {imports:.2f} GB of its imports"
    else:
        what = "what PyTorch has allocated on the device in a process of its own"
    phase = "T3 decodes" if rows and rows[0].runs and rows[0].runs[0]["tokens"] else "flow matching computes"
    lines = [f"GB: {what}, while {phase} (median); peak: during the request"]
    lines.append("RTF: seconds of computation a second of speech; speed: upstream's time over this one's, in turns")
    if speaks:
        lines.append(
            "top-1, KL: T3's likeliest token, and its distribution, against upstream's, before upstream's tokens"
        )
    lines.append("SNR: samples made of upstream's tokens with the same noise, against upstream's")
    return lines
