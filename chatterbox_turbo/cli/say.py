"""``say``: text to a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    output = output or Path("speech.wav")
    if sink == "file":
        _check_format(output)
        options.check_writable(output)
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
            tell(screen, metrics, lead, {"file": str(output), "pcm": "standard output", "card": "sound card"}[sink])
            return
        start = time.perf_counter()
        torch.manual_seed(seed)
        wav = speaker.generate(**request)
        seconds = time.perf_counter() - start
        usage = speaker.turbo.memory()
        marked = detected(speaker.watermarker, wav, speaker.sr)
    soundfile.write(output, wav.squeeze(0).cpu().numpy(), speaker.sr)
    length = wav.shape[-1] / speaker.sr
    if loaded.kind == "synthetic":
        screen.print(f"model: {loaded.description}")
    mark = "watermark detected" if marked else "NO WATERMARK DETECTED"
    screen.print(f"{output}: {length:.2f} s of speech in {seconds:.2f} s ({seconds / length:.2f}x real time), {mark}")
    if memory:
        show_memory(screen, usage)
    if memory_png is not None:
        screen.print(f"{usage.plot(memory_png)}: memory over the time of the request")
    if not marked:
        raise typer.Exit(1)


def show_memory(screen: Screen, usage: Usage) -> None:
    """The table of the memory, and the lines below it."""
    shown = table("", *usage.columns)
    for row in usage.rows():
        shown.add_row(*row)
    screen.print(shown)
    for note in usage.notes():
        screen.print(note)


def _text(argument: str | None) -> str:
    text = sys.stdin.read() if argument in (None, "-") else argument
    if not text.strip():
        raise typer.BadParameter("the text is empty: give it as an argument or on standard input.")
    return text.strip()


def _check_format(output: Path) -> None:
    import soundfile

    known = sorted(name.lower() for name in soundfile.available_formats())
    if output.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"unknown audio format {output.suffix!r} of {output}: use .wav or .flac.")


def _progress(screen: Screen):
    from ..upstream.t3 import TOKENS_PER_SECOND

    def show(count: int, limit: int) -> None:
        if screen.err.is_terminal:
            screen.announce(f"speaking: {count} tokens, {count / TOKENS_PER_SECOND:.1f} s of speech")

    return show
