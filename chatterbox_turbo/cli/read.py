"""``read``: a text file of any length to an audio file, with interruptions."""

from __future__ import annotations

import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .loading import Wanted, load_model, request_for
from .options import ModelName
from .progress import duration, ended_by_sigterm, progress_bar
from .screen import Screen
from .voice_folder import chosen, needs_name

if TYPE_CHECKING:
    from ..speech.reading import BookReport

TOLD = 5  # pieces that stayed wrong


class SubtitleFormat(str, Enum):
    """Of ``speech.subtitles``."""

    srt = "srt"
    vtt = "vtt"


def read(
    context: typer.Context,
    book: Annotated[Path, typer.Argument(exists=True, dir_okay=False, metavar="BOOK", help="A text file.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A .wav, .flac, .opus or .ogg (Opus) file; BOOK.flac where left out."),
    ] = None,
    chapters: Annotated[bool, typer.Option("--chapters", help="One file a chapter: book-01.flac, ...")] = False,
    encoding: Annotated[str, typer.Option("--encoding", help="Of BOOK: cp1252, latin-1, utf-16, ...")] = "utf-8",
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what an interrupted run has kept; overwrite the output.")
    ] = False,
    keep_parts: Annotated[bool, typer.Option("--keep-parts", help="Leave the folder of pieces in place.")] = False,
    subtitles: Annotated[
        SubtitleFormat | None, typer.Option("--subtitles", help="Times of sentences beside the audio.")
    ] = None,
    words: Annotated[
        bool, typer.Option("--words", help="Times of words in the subtitles; of a multilingual model.")
    ] = False,
    model: options.Model = ModelName.english,
    language: options.Language = "en",
    voice: options.VoiceOrName = None,
    voice_folder: options.VoiceFolder = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of the first piece; the others follow.")] = 0,
    synthetic: options.Synthetic = False,
    size: options.SizeByWeights = None,
    checkpoint: options.Checkpoint = None,
    stop_after: options.StopAfter = None,
) -> None:
    """Read a book aloud, into a file.

    The text is cut into pieces of some 12 s. Pieces that are finished lie in a folder beside the output
    (book.flac.parts): after an interruption of any kind the same command goes on there, and the result is the same.
    Times of chapters are written beside the output (book.chapters.json).
    """
    screen = options.screen_of(context)
    options.check_speaks(model)
    needs_name(voice, voice_folder)
    voices, spoken_with = chosen(voice, voice_folder)
    if words and subtitles is None:
        raise typer.BadParameter("--words needs --subtitles srt or vtt.")
    if words and model is not ModelName.multilingual:
        raise typer.BadParameter(f"--words needs --model multilingual: words of {model.value} have no times.")
    output = book.with_suffix(".flac") if output is None else output
    options.check_writable(output)
    with screen.step("importing torch"), screen.quiet():
        from ..api import apply
        from ..errors import RunawayWarning
        from ..speech.book import Book
        from ..speech.files import audio_format
    audio_format(output)
    for _ in Book(book, encoding).text():  # what is no text is told before a model is loaded
        pass
    settings = options.configuration(screen, preset, config)
    size = options.size_for(size, checkpoint)
    wanted = Wanted(model.value, options.device_named(device), size, stop_after, synthetic, checkpoint, fallback=False)
    with screen.step("importing chatterbox-tts"), screen.quiet():
        options.check_language(model, language)
    loaded = load_model(screen, wanted)
    with screen.step("preparing"), screen.quiet():
        apply(loaded.model, settings)
    if loaded.kind == "synthetic":
        screen.print(f"model: {loaded.description}")
    voices.load(loaded.model, [*voices.digests])
    arguments = {**request_for(loaded.model, "", language), **spoken_with}
    del arguments["text"]
    parts = output.with_name(f"{output.name}.parts")
    try:
        with ended_by_sigterm(), progress_bar(screen, "reading", 1.0) as show:

            def told(now) -> None:
                words = f"{now.pieces:,} of {now.all_pieces:,} pieces, {duration(now.seconds)} of speech"
                show(now.tokens / now.all_tokens, words)

            with screen.quiet(bars=True), warnings.catch_warnings():
                warnings.simplefilter("ignore", RunawayWarning)  # the report has them
                report = loaded.model.turbo.read(
                    book,
                    output,
                    seed=seed,
                    encoding=encoding,
                    chapters=chapters,
                    restart=restart,
                    keep_parts=keep_parts,
                    subtitles=None if subtitles is None else subtitles.value,
                    words=words,
                    progress=told,
                    **arguments,
                )
    except KeyboardInterrupt:
        if parts.exists():
            screen.note(f"what is finished is kept in {parts}: the same command goes on")
        raise
    _show(screen, report, "words" if words else "sentences")


def _show(screen: Screen, report: BookReport, what: str) -> None:
    for line in report.faulty[:TOLD]:
        screen.note(f"warning: a piece stayed wrong and was kept as it is: {line}")
    first, last = report.files[0], report.files[-1]
    names = str(first) if first == last else f"{first} to {last} ({len(report.files)} files)"
    screen.print(f"{names}: {duration(report.seconds)} of speech ({report.seconds:.2f} s)")
    for path in report.subtitles[:TOLD]:
        screen.print(f"{path}: times of {what}")
    if report.chapters is not None:
        screen.print(f"{report.chapters}: times of chapters")
    screen.print(
        f"{report.pieces:,} pieces, {report.resumed:,} of an earlier run; {report.retried} said again, "
        f"{len(report.faulty)} kept though they went wrong"
    )
    if report.real_time_factor is not None:
        spent = f"{duration(report.elapsed)} ({report.real_time_factor:.2f}x real time)"
        screen.print(f"{duration(report.said)} of speech in {spent}")
