"""``batch --ray``: the same lines, spoken by actors."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..speech.lines import Line
from .loading import Wanted, check
from .screen import Screen
from .speaking import speaking_model
from .voice_folder import VoiceFolder

if TYPE_CHECKING:
    from ..config import OptimizationConfig


@dataclass(frozen=True)
class Actors:
    """How many there are to be, ``None`` for as many as there is room for, and what each holds."""

    number: int | None
    cpus: float
    gpus: float | None


@contextmanager
def speaking_on_ray(
    screen: Screen,
    lines: Sequence[Line],
    folder: Path,
    actors: Actors,
    wanted: Wanted,
    settings: OptimizationConfig,
    voices: VoiceFolder,
    names: Sequence[str],
    **how: Any,
) -> Iterator[Generator[tuple[Line, dict[str, Any]], None, None]]:
    """What ``cluster.speak`` gives, with ``how``, while there is Ray; the device ``auto`` is what actors hold.

    Raises: as that, and what ``load_model`` raises before it loads.
    """
    from .. import cluster

    why = check(screen, wanted)
    if why:
        screen.print(f"model: SYNTHETIC ({wanted.size}), random weights. Why: {why}.")
    with _connected(screen) as gpus_there:
        gpus = float(gpus_there > 0) if actors.gpus is None else actors.gpus
        device = ("cuda" if gpus else "cpu") if wanted.device == "auto" else wanted.device
        checkpoint = wanted.checkpoint and wanted.checkpoint.resolve()
        there = replace(wanted, device=device, checkpoint=checkpoint)
        load = partial(_actors_model, there, settings, voices.absolute(), names)
        series = cluster.speak(
            [_absolute(line) for line in lines],
            folder,
            load,
            actors=actors.number,
            cpus=actors.cpus,
            gpus=gpus,
            **how,
        )
        with closing(series):
            yield series


def _actors_model(wanted: Wanted, settings: OptimizationConfig, voices: VoiceFolder, names: Sequence[str]) -> Any:
    return speaking_model(Screen([]), wanted, settings, voices, names)


@contextmanager
def _connected(screen: Screen) -> Iterator[float]:
    """A connection to Ray; yields how many GPUs it has.

    Raises:
        TurboError: the cluster cannot be reached.
    """
    from ..cluster.ray_itself import connect, imported

    ray = imported("data")
    ray.data.DataContext.get_current().enable_progress_bars = False
    with screen.step(f"connecting to Ray at {where}" if (where := os.environ.get("RAY_ADDRESS")) else "starting Ray"):
        connect(ray, include_dashboard=None if where else False, log_to_driver=screen.debug)
    try:
        there = ray.cluster_resources()
        screen.note(f"Ray: {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs on {len(ray.nodes())} machines")
        yield there.get("GPU", 0.0)
    finally:
        ray.shutdown()


def _absolute(line: Line) -> Line:
    """With its recording's whole path: an actor has another working directory."""
    recording = line.item.get("audio_prompt_path")
    if recording is None:
        return line
    return replace(line, item={**line.item, "audio_prompt_path": str(Path(recording).resolve())})
