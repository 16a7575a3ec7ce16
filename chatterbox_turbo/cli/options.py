"""Options that several sub-commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .screen import Screen

if TYPE_CHECKING:
    from ..config import OptimizationConfig

TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds at all."


class ModelName(str, Enum):
    """The families of ``upstream.families``, which imports torch; a test compares the two."""

    english = "english"
    multilingual = "multilingual"
    turbo = "turbo"
    nano = "nano"
    vc = "vc"


class SizeName(str, Enum):
    """Sizes of a synthetic model."""

    tiny = "tiny"
    full = "full"


Model = Annotated[ModelName, typer.Option("--model", help="Upstream's model; vc is voice conversion.")]
Size = Annotated[SizeName, typer.Option("--size", help="Of a synthetic model, or of the one in --checkpoint.")]
SizeByWeights = Annotated[
    SizeName | None,
    typer.Option("--size", help="Of a synthetic model (default tiny), or of the one in --checkpoint (full)."),
]
Synthetic = Annotated[bool, typer.Option("--synthetic", help="Random weights, though there may be real ones.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", exists=True, file_okay=False, help="Folder for upstream's from_local."),
]
StopAfter = Annotated[
    int | None, typer.Option("--stop-after", min=2, max=990, help="Speech tokens of a synthetic model (25 a second).")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the global random generator, before every generation.")]
Preset = Annotated[str | None, typer.Option("--preset", help="A preset's name (see presets).")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", exists=True, dir_okay=False, help="A TOML, YAML or JSON file.")
]
Voice = Annotated[
    Path | None, typer.Option("--voice", exists=True, dir_okay=False, help="Recording of the reference voice.")
]
VoiceOrName = Annotated[
    str | None,
    typer.Option("--voice", help="Recording of the reference voice; with --voice-folder, the name of a voice."),
]
VoiceFolder = Annotated[
    Path | None, typer.Option("--voice-folder", file_okay=False, help="Of named voices (see voices).")
]
Language = Annotated[str, typer.Option("--language", help="Code of the language (multilingual).")]
Audio = Annotated[
    Path, typer.Option("--audio", exists=True, file_okay=False, help="Folder of recordings; whatever soundfile reads.")
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON to a file, or to stdout: -")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def screen_of(context: typer.Context) -> Screen:
    """The screen that ``main`` made."""
    return context.obj


def configuration(screen: Screen, preset: str | None, file: Path | None) -> OptimizationConfig:
    """The configuration asked for, without its progress bar (it would draw over ours) unless debugging.

    Raises:
        InvalidConfigError: unknown preset, bad file.
        typer.BadParameter: both were given.
    """
    from ..config import resolve

    if preset is not None and file is not None:
        raise typer.BadParameter("give either --preset or --config: a file may name its own preset.")
    config = resolve(file if file is not None else preset)
    return config if screen.debug else with_progress(config, "off")


def with_progress(config: OptimizationConfig, progress: object) -> OptimizationConfig:
    """The same configuration with another ``decoding.progress``."""
    return config.model_copy(update={"decoding": config.decoding.model_copy(update={"progress": progress})})


def size_for(size: SizeName | None, checkpoint: Path | None) -> str:
    """The size asked for; by default that of real weights in a checkpoint folder, and of quick random ones."""
    return (size or (SizeName.full if checkpoint else SizeName.tiny)).value


def device_named(name: str) -> str:
    """A device that is there; ``auto`` is the first CUDA device or the CPU.

    Raises:
        typer.BadParameter: it is not there.
    """
    from ..errors import InvalidRequestError
    from ..runtime.device import devices as device

    try:
        return device.device_named(name)
    except InvalidRequestError as error:
        raise typer.BadParameter(str(error)) from None


def check_speaks(model: ModelName) -> None:
    """A refusal of voice conversion by commands that speak texts.

    Raises:
        typer.BadParameter: it is that.
    """
    if model is ModelName.vc:
        raise typer.BadParameter("vc converts speech and speaks no text: use english, multilingual, turbo or nano.")


def check_language(model: ModelName, language: str) -> None:
    """Look whether a model speaks a language; imports chatterbox for those that speak several.

    Raises:
        typer.BadParameter: it does not.
    """
    if model is not ModelName.multilingual:
        if language != "en":
            raise typer.BadParameter(f"--language {language}: only --model multilingual speaks other languages.")
        return

    from ..upstream.loading import model_class

    known = model_class(model.value).get_supported_languages()
    if language.lower() not in known:
        raise typer.BadParameter(f"unknown language {language!r}; the model speaks: {', '.join(sorted(known))}.")


def check_writable(path: Path) -> Path:
    """The path of a file that can be written: found out before the long work, not after it.

    Raises:
        typer.BadParameter: it cannot; the message says why.
    """
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror or error}.") from None
    if not existed:
        path.resolve().unlink()  # of a link that led nowhere, what it leads to now
    return path
