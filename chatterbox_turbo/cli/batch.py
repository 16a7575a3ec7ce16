"""``batch``: lines of JSON to a folder of audio files, with interruptions."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..speech.lines import RESULTS, Line, finished, results_of, speak_lines
from . import options
from .loading import Wanted
from .on_ray import Actors, speaking_on_ray
from .options import ModelName
from .progress import duration, ended_by_sigterm, progress_bar
from .prompts import arguments_of, digest_of, read_prompts
from .screen import Screen
from .speaking import speaking_model
from .voice_folder import chosen

TOLD = 5  # failures


class FormatName(str, Enum):
    """Endings of the files."""

    wav = "wav"
    flac = "flac"


def batch(
    context: typer.Context,
    prompts: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, metavar="PROMPTS", help="One JSON object a line, in UTF-8; or .parquet."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", file_okay=False, metavar="FOLDER", help="For the files.")],
    format: Annotated[FormatName, typer.Option("--format", help="Of the files.")] = FormatName.wav,
    times: Annotated[
        bool,
        typer.Option(
            "--times", help="Of sentences, and of the words of a multilingual model, in seconds: in results.jsonl."
        ),
    ] = False,
    slots: Annotated[int | None, typer.Option("--slots", min=1, help="Utterances decoded at once; 8.")] = None,
    model: options.Model = ModelName.english,
    language: options.Language = "en",
    voice: options.VoiceOrName = None,
    voice_folder: options.VoiceFolder = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option("--seed", help="A line's own is this and the line's number.", min=0)] = 0,
    synthetic: options.Synthetic = False,
    size: options.SizeByWeights = None,
    checkpoint: options.Checkpoint = None,
    stop_after: options.StopAfter = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="On the Ray that RAY_ADDRESS names, else on one of this machine's: docs/cluster.md."
        ),
    ] = False,
    actors: Annotated[int | None, typer.Option("--actors", min=1, help="Of Ray; as many as there is room for.")] = None,
    actor_cpus: Annotated[
        float | None, typer.Option("--actor-cpus", min=0.0, help="That an actor holds; 1 where left out.")
    ] = None,
    actor_gpus: Annotated[
        float | None, typer.Option("--actor-gpus", min=0.0, help="That an actor holds; 1 where Ray has GPUs.")
    ] = None,
) -> None:
    """Speak many texts, several at once.

    A line has a "text", and optionally an "id" (the file's name; the line's number where it is missing), a "voice" (a
    name of --voice-folder, or a recording; --voice where it is missing), a "seed", and any argument of generate.
    FOLDER/results.jsonl gets a line as each is finished. The same command goes on after an interruption: it speaks what
    is new, changed, failed or gone. Exit code 1 if a line failed.
    """
    screen = options.screen_of(context)
    options.check_speaks(model)
    if not ray and any(given is not None for given in (actors, actor_cpus, actor_gpus)):
        raise typer.BadParameter("--actors, --actor-cpus and --actor-gpus are for --ray.")
    voices, spoken_with = chosen(voice, voice_folder)
    with screen.step("importing torch"), screen.quiet():
        from ..upstream.loading import model_class
    settings = options.configuration(screen, preset, config)
    size = options.size_for(size, checkpoint)
    device = device if ray and device == "auto" else options.device_named(device)
    wanted = Wanted(model.value, device, size, stop_after, synthetic, checkpoint, fallback=False)
    with screen.step("importing chatterbox-tts"), screen.quiet():
        options.check_language(model, language)
        family = model_class(model.value)
    several = model is ModelName.multilingual
    given = {**({"language_id": language} if several else {}), **spoken_with}
    known = family.get_supported_languages() if several else ()
    lines = read_prompts(prompts, arguments_of(family.generate), seed, given, known, voices)
    output.mkdir(parents=True, exist_ok=True)
    options.check_writable(output / RESULTS)
    about = settings.model_dump()
    about["decoding"].pop("progress")
    made_by = (model.value, str(checkpoint), stop_after, about, *(["times"] if times else []))
    made_by += ("synthetic", size) if synthetic else ()  # of a trial nothing counts as finished
    lines = [replace(line, digest=digest_of(line, *made_by, voices=voices.digests)) for line in lines]
    done = finished(output)
    left = [line for line in lines if done.get(f"{line.name}.{format.value}") != line.digest]
    if len(left) < len(lines):
        screen.note(f"{len(lines) - len(left):,} of {len(lines):,} lines are finished already")
    if not left:
        screen.print(f"{output}: all {len(lines):,} lines are finished")
        return
    named = sorted({line.item["voice"] for line in left if "voice" in line.item})
    how: dict[str, Any] = {"ending": format.value, "times": times, **({"slots": slots} if slots else {})}
    if ray:
        held = Actors(actors, 1.0 if actor_cpus is None else actor_cpus, actor_gpus)
        speaking: Any = speaking_on_ray(screen, left, output, held, wanted, settings, voices, named, **how)
    else:
        loaded = speaking_model(screen, wanted, settings, voices, named)
        speaking = nullcontext(speak_lines(loaded, left, output, **how))
    work = Work(screen, output)
    try:
        with ended_by_sigterm(), speaking as spoken:
            work.run(left, spoken)
    except KeyboardInterrupt:
        screen.note(f"{work.spoken:,} of {len(left):,} lines are finished: the same command goes on")
        raise
    for failure in work.failures[:TOLD]:
        screen.note(f"warning: {failure}")
    if len(work.failures) > TOLD:
        screen.note(f"warning: and {len(work.failures) - TOLD} more, in {output / RESULTS}")
    factor = f" ({work.elapsed / work.seconds:.2f}x real time)" if work.seconds else ""
    screen.print(
        f"{output}: {work.spoken:,} of {len(left):,} lines, {duration(work.seconds)} of speech in "
        f"{duration(work.elapsed)}{factor}, {len(work.failures)} failed"
    )
    if work.failures:
        raise typer.Exit(1)


class Work:
    """Lines on their way to files.

    Attributes:
        spoken: lines that are finished. seconds: of speech. elapsed: seconds that it took.
        failures: a line of text each.
    """

    def __init__(self, screen: Screen, folder: Path):
        self._screen, self._folder = screen, folder
        self.spoken, self.seconds, self.elapsed = 0, 0.0, 0.0
        self.failures: list[str] = []

    def run(self, lines: Sequence[Line], spoken: Generator[tuple[Line, dict[str, Any]], None, None]) -> None:
        """Have lines spoken, and add what became of each to ``results.jsonl`` as it does.

        Raises:
            TurboError: a file cannot be written.
        """
        from ..text import estimate_tokens

        sizes = {line.name: 1.0 + estimate_tokens(line.item["text"], line.item.get("language_id")) for line in lines}
        done, start = 0.0, time.perf_counter()
        with (
            results_of(self._folder) as add,
            progress_bar(self._screen, "speaking", sum(sizes.values())) as show,
            self._screen.quiet(bars=True),
            closing(spoken),
        ):
            show(0.0, f"0 of {len(lines):,} lines")
            for line, record in spoken:
                add(record)
                if record["error"] is None:
                    self.spoken, self.seconds = self.spoken + 1, self.seconds + record["seconds"]
                else:
                    self.failures.append(f"line {line.number} ({line.name}): {record['error']}")
                done, self.elapsed = done + sizes[line.name], time.perf_counter() - start
                failed = f", {len(self.failures)} failed" if self.failures else ""
                show(done, f"{self.spoken + len(self.failures):,} of {len(lines):,} lines{failed}")
