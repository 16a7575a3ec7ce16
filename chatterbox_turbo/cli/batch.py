"""``batch``: lines of JSON to a folder of audio files, with interruptions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from . import options
from .loading import Wanted, load_model
from .options import ModelName
from .progress import duration, ended_by_sigterm, progress_bar
from .prompts import Prompt, arguments_of, read_prompts
from .screen import Screen
from .voice_folder import chosen

RESULTS = "results.jsonl"
TOLD = 5  # failures


class FormatName(str, Enum):
    """Endings of the files."""

    wav = "wav"
    flac = "flac"


def batch(
    context: typer.Context,
    prompts: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, metavar="PROMPTS", help="One JSON object a line, in UTF-8."),
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
) -> None:
    """Speak many texts, several at once.

    A line has a "text", and optionally an "id" (the file's name; the line's number where it is missing), a "voice" (a
    name of --voice-folder, or a recording; --voice where it is missing), a "seed", and any argument of generate.
    FOLDER/results.jsonl gets a line as each is finished. The same command goes on after an interruption: it speaks what
    is new, changed, failed or gone. Exit code 1 if a line failed.
    """
    screen = options.screen_of(context)
    options.check_speaks(model)
    voices, spoken_with = chosen(voice, voice_folder)
    with screen.step("importing torch"), screen.quiet():
        from ..api import apply
        from ..upstream.loading import model_class
    settings = options.configuration(screen, preset, config)
    size = options.size_for(size, checkpoint)
    wanted = Wanted(model.value, options.device_named(device), size, stop_after, synthetic, checkpoint, fallback=False)
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
    digests = {line.line: line.digest(*made_by, voices=voices.digests) for line in lines}
    done = finished(output)
    left = [line for line in lines if done.get(f"{line.name}.{format.value}") != digests[line.line]]
    if len(left) < len(lines):
        screen.note(f"{len(lines) - len(left):,} of {len(lines):,} lines are finished already")
    if not left:
        screen.print(f"{output}: all {len(lines):,} lines are finished")
        return
    loaded = load_model(screen, wanted)
    with screen.step("preparing"), screen.quiet():
        apply(loaded.model, settings)
        voices.load(loaded.model, sorted({line.item["voice"] for line in left if "voice" in line.item}))
    if loaded.kind == "synthetic":
        screen.print(f"model: {loaded.description}")
    work = Work(screen, loaded.model, output, format.value, digests)
    try:
        with ended_by_sigterm():
            work.run(left, slots, times)
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


def finished(folder: Path) -> dict[str, str]:
    """File and digest of each line that ``results.jsonl`` has, whose file is there."""
    found: dict[str, str] = {}
    results = folder / RESULTS
    for line in results.read_bytes().splitlines() if results.exists() else []:
        try:
            result = json.loads(line)
            found[result["file"]] = "" if result["error"] else result["digest"]
        except (ValueError, KeyError, TypeError):  # what an interruption has cut
            continue
    return {file: digest for file, digest in found.items() if digest and (folder / file).is_file()}


class Work:
    """Lines on their way to files.

    Attributes:
        spoken: lines that are finished. seconds: of speech. elapsed: seconds that it took.
        failures: a line of text each.
    """

    def __init__(self, screen: Screen, model: Any, folder: Path, ending: str, digests: dict[int, str]):
        self._screen, self._model = screen, model
        self._folder, self._ending, self._digests = folder, ending, digests
        self.spoken, self.seconds, self.elapsed = 0, 0.0, 0.0
        self.failures: list[str] = []

    def run(self, lines: Sequence[Prompt], slots: int | None, times: bool = False) -> None:
        """Speak lines, and add what became of each to ``results.jsonl`` as it does.

        Raises:
            TurboError: a file cannot be written.
        """
        from ..text import estimate_tokens

        sizes = [1.0 + estimate_tokens(line.item["text"], line.item.get("language_id")) for line in lines]
        done, start = 0.0, time.perf_counter()
        items = (line.item for line in lines)
        series: Iterator[Any] = self._model.turbo.as_completed(items, slots, True, times)
        with (
            (self._folder / RESULTS).open("a+b") as results,
            progress_bar(self._screen, "speaking", sum(sizes)) as show,
            self._screen.quiet(bars=True),
            closing(series),
        ):
            _end_line(results)
            show(0.0, f"0 of {len(lines):,} lines")
            for number, result in series:
                self._keep(lines[number], result, results)
                done, self.elapsed = done + sizes[number], time.perf_counter() - start
                failed = f", {len(self.failures)} failed" if self.failures else ""
                show(done, f"{self.spoken + len(self.failures):,} of {len(lines):,} lines{failed}")

    def _keep(self, line: Prompt, result: Any, results: BinaryIO) -> None:
        from ..errors import TurboError, describe
        from ..speech.files import KEPT, audio_written
        from ..speech.times import TimedSpeech

        name = f"{line.name}.{self._ending}"
        known = {"id": line.name, "line": line.line, "file": name, "seconds": None, "seed": line.item["seed"]}
        error = None
        if isinstance(result, Exception):
            error = describe(result)
            self.failures.append(f"line {line.line} ({line.name}): {error}")
        else:
            if isinstance(result, TimedSpeech):
                known["sentences"] = [_told(one) for one in result.sentences]
                known["words"] = [_told(one) for one in result.words]
                result = result.samples
            samples, rate = result.squeeze(0).cpu().numpy(), self._model.sr
            with audio_written(self._folder / name, rate) as write:
                write(samples)
            known["seconds"] = len(samples) / rate
        told = {**known, "error": error, "digest": self._digests[line.line]}
        try:
            results.write(json.dumps(told, ensure_ascii=False).encode() + b"\n")
            results.flush()
        except OSError as full:
            raise TurboError(f"{results.name} cannot be written: {full.strerror or full}.", "", KEPT) from full
        if error is None:
            self.spoken, self.seconds = self.spoken + 1, self.seconds + known["seconds"]


def _told(one: Any) -> dict[str, Any]:
    """A sentence or word, in seconds."""
    return {"text": one.text, "start": round(one.start, 3), "end": round(one.end, 3), "source": one.source}


def _end_line(results: BinaryIO) -> None:
    """End a last line that an interruption has cut, so that the next one is its own."""
    if results.seek(0, 2):
        results.seek(-1, 2)
        if results.read(1) != b"\n":
            results.write(b"\n")
