"""``say``: text to a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .loading import Wanted, load_model, request_for
from .options import ModelName, SizeName
from .screen import Screen


def say(
    context: typer.Context,
    text: Annotated[str | None, typer.Argument(help="What to say; left out or '-': standard input.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A WAV or FLAC file.")] = Path("speech.wav"),
    model: options.Model = ModelName.english,
    language: Annotated[str, typer.Option("--language", help="Code of the language (multilingual).")] = "en",
    voice: options.Voice = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    synthetic: options.Synthetic = False,
    size: Annotated[
        SizeName | None,
        typer.Option("--size", help="Of a synthetic model (default tiny), or of the one in --checkpoint (full)."),
    ] = None,
    checkpoint: options.Checkpoint = None,
    stop_after: options.StopAfter = None,
) -> None:
    """Speak a text with an optimized model."""
    screen = options.screen_of(context)
    if model is ModelName.vc:
        raise typer.BadParameter("vc converts speech and speaks no text: use english, multilingual, turbo or nano.")
    text = _text(text)
    _check_format(output)
    options.check_writable(output)

    with screen.step("importing torch"), screen.quiet():
        from ..api import apply
    settings = options.configuration(screen, preset, config)
    default = SizeName.full if checkpoint else SizeName.tiny
    wanted = Wanted(
        model.value, options.device_named(device), (size or default).value, stop_after, synthetic, checkpoint, False
    )
    with screen.step("importing chatterbox-tts"), screen.quiet():
        _check_language(model, language)
    loaded = load_model(screen, wanted)
    speaker = loaded.model
    with screen.step("speaking"), screen.quiet():
        if not screen.debug:
            settings = options.with_progress(settings, _progress(screen))
        apply(speaker, settings)
        import soundfile
        import torch

        from ..passes.watermark import detected

        start = time.perf_counter()
        torch.manual_seed(seed)
        wav = speaker.generate(**request_for(speaker, text, language, voice))
        seconds = time.perf_counter() - start
        marked = detected(speaker.watermarker, wav, speaker.sr)
    soundfile.write(output, wav.squeeze(0).cpu().numpy(), speaker.sr)
    length = wav.shape[-1] / speaker.sr
    if loaded.kind == "synthetic":
        screen.print(f"model: {loaded.description}")
    mark = "watermark detected" if marked else "NO WATERMARK DETECTED"
    screen.print(f"{output}: {length:.2f} s of speech in {seconds:.2f} s ({seconds / length:.2f}x real time), {mark}")
    if not marked:
        raise typer.Exit(1)


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


def _check_language(model: ModelName, language: str) -> None:
    if model is not ModelName.multilingual:
        if language != "en":
            raise typer.BadParameter(f"--language {language}: only --model multilingual speaks other languages.")
        return

    from ..upstream.loading import model_class

    known = model_class(model.value).get_supported_languages()
    if language.lower() not in known:
        raise typer.BadParameter(f"unknown language {language!r}; the model speaks: {', '.join(sorted(known))}.")


def _progress(screen: Screen):
    from ..passes.token_model import TOKENS_PER_SECOND

    def show(count: int, limit: int) -> None:
        if screen.err.is_terminal:
            screen.announce(f"speaking: {count} tokens, {count / TOKENS_PER_SECOND:.1f} s of speech")

    return show
