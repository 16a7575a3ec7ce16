"""``say``: text to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import Wanted, load_model, request_for
from .machine import version
from .options import ModelName
from .playing import check_sink, play, tell
from .screen import Screen, table
from .voice_folder import chosen, needs_name

if TYPE_CHECKING:
    from ..memory import Usage


def say(
    context: typer.Context,
    text: Annotated[str | None, typer.Argument(help="What to say; left out or '-': standard input.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A WAV or FLAC file: speech.wav. With --stream also '-'.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Hear it while it is made: by the sound card (sounddevice), else as 16-bit PCM at 24 kHz on standard "
            "output.",
        ),
    ] = False,
    model: options.Model = ModelName.english,
    language: options.Language = "en",
    voice: options.VoiceOrName = None,
    voice_folder: options.VoiceFolder = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    synthetic: options.Synthetic = False,
    size: options.SizeByWeights = None,
    checkpoint: options.Checkpoint = None,
    stop_after: options.StopAfter = None,
    memory: Annotated[bool, typer.Option("--memory", help="Print what is in memory, and peaks by phase.")] = False,
    memory_png: Annotated[
        Path | None, typer.Option("--memory-png", metavar="FILE", help="Draw memory over the time of the request.")
    ] = None,
) -> None:
    """Speak a text with an optimized model."""
    screen = options.screen_of(context)
    options.check_speaks(model)
    text = _text(text)
    needs_name(voice, voice_folder)
    voices, spoken_with = chosen(voice, voice_folder)
    sink = check_sink(output) if stream else "file"
    if stream:
        context.with_resource(redirect_stdout(sys.stderr))  # what upstream prints is no sample
    told = screen.note if stream else screen.print
    output = output or Path("speech.wav")
    if sink == "file":
        _check_format(output)
        options.check_writable(output)
    if memory_png is not None and stream:
        raise typer.BadParameter("--memory-png is without --stream, whose memory is not recorded over time: --memory.")
    if memory_png is not None:
        options.check_writable(memory_png)
        if not version("matplotlib"):
            raise typer.BadParameter("--memory-png needs matplotlib: pip install 'chatterbox-turbo[plot]'.")

    with screen.step("importing torch"), screen.quiet():
        from ..api import apply
    settings = options.configuration(screen, preset, config)
    size = options.size_for(size, checkpoint)
    wanted = Wanted(model.value, options.device_named(device), size, stop_after, synthetic, checkpoint, fallback=False)
    with screen.step("importing chatterbox-tts"), screen.quiet():
        options.check_language(model, language)
    loaded = load_model(screen, wanted)
    speaker = loaded.model
    with screen.step("speaking"), screen.quiet():
        if not screen.debug:
            settings = options.with_progress(settings, _progress(screen))
        apply(speaker, settings)
        voices.load(speaker, [*voices.digests])
        request = {**request_for(speaker, text, language), **spoken_with}
        import soundfile
        import torch

        from ..passes.watermark import detected

        if stream:
            metrics, lead = play(speaker.turbo.stream(seed=seed, **request), sink, output, speaker.sr)
        else:
            start = time.perf_counter()
            torch.manual_seed(seed)
            wav = speaker.generate(**request)
            seconds = time.perf_counter() - start
            marked = detected(speaker.watermarker, wav, speaker.sr)
        usage = speaker.turbo.memory()
    if loaded.kind == "synthetic":
        told(f"model: {loaded.description}")
    if stream:
        tell(screen, metrics, lead, {"file": str(output), "pcm": "standard output", "card": "sound card"}[sink])
        _show_memory(told, usage, memory, None)
        return
    soundfile.write(output, wav.squeeze(0).cpu().numpy(), speaker.sr)
    length = wav.shape[-1] / speaker.sr
    mark = "watermark detected" if marked else "NO WATERMARK DETECTED"
    screen.print(f"{output}: {length:.2f} s of speech in {seconds:.2f} s ({seconds / length:.2f}x real time), {mark}")
    _show_memory(told, usage, memory, memory_png)
    if not marked:
        raise typer.Exit(1)


def _show_memory(told: Callable[[Any], None], usage: Usage, shown: bool, picture: Path | None) -> None:
    """The table of the memory with the lines below it, and the picture, where they are asked for."""
    if shown:
        rows = table("", *usage.columns)
        for row in usage.rows():
            rows.add_row(*row)
        for line in (rows, *usage.notes()):
            told(line)
    if picture is not None:
        told(f"{usage.plot(picture)}: memory over the time of the request")


def _text(argument: str | None) -> str:
    text = sys.stdin.read() if argument in (None, "-") else argument
    if not text.strip():
        raise typer.BadParameter("the text is empty: give it as an argument or on standard input.")
    return text.strip()


def _check_format(output: Path) -> None:
    import soundfile

    # RAW has no coding of its own, and no header to read it by
    known = {name.lower() for name in soundfile.available_formats()} - {"raw"}
    if output.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"unknown audio format {output.suffix!r} of {output}: use .wav or .flac.")


def _progress(screen: Screen):
    from ..upstream.t3 import TOKENS_PER_SECOND

    def show(count: int, limit: int) -> None:
        if screen.err.is_terminal:
            screen.announce(f"speaking: {count} tokens, {count / TOKENS_PER_SECOND:.1f} s of speech")

    return show
