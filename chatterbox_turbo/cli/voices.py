"""``voices``: a folder of named voices; only ``add`` needs a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .loading import Wanted, load_model
from .options import ModelName, SizeName
from .screen import Screen, table

if TYPE_CHECKING:
    from ..upstream.voices import NamedVoice

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Keep voices by name in a folder.")

Folder = Annotated[Path, typer.Option("--folder", file_okay=False, help="Of voices: one <name>.safetensors each.")]
Name = Annotated[str, typer.Argument(help="Of the voice.")]
Replace = Annotated[bool, typer.Option("--replace", help="Take the place of what is there.")]


@app.command()
def add(
    context: typer.Context,
    name: Name,
    audio: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A recording; ten seconds are good.")],
    folder: Folder,
    model: options.Model = ModelName.english,
    device: options.Device = "auto",
    checkpoint: options.Checkpoint = None,
    synthetic: options.Synthetic = False,
    size: Annotated[
        SizeName | None,
        typer.Option("--size", help="Of a synthetic model (default tiny), or of the one in --checkpoint (full)."),
    ] = None,
    replace: Replace = False,
) -> None:
    """Encode a recording with a model, and keep the voice in the folder, which is made where it is missing."""
    screen = options.screen_of(context)
    name = _checked(name)
    _check_free(folder, name, replace)
    with screen.step("importing torch"), screen.quiet():
        from ..api import apply
        from ..config import OptimizationConfig
    default = SizeName.full if checkpoint else SizeName.tiny
    wanted = Wanted(
        model.value,
        options.device_named(device),
        (size or default).value,
        None,
        synthetic,
        checkpoint,
        False,
    )
    speaker = load_model(screen, wanted).model
    rest = {section: {"enabled": section == "conditioning"} for section, _ in OptimizationConfig().sections()}
    with screen.step("encoding the recording"), screen.quiet():
        kept = apply(speaker, {**rest, "conditioning": {}}).turbo.voices
        kept.add(name, audio)
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, name)
    new = path.with_name(f".{path.name}.new")  # what is there is not read: it may be damaged
    new.unlink(missing_ok=True)
    kept.export(name, new)
    new.replace(path)
    screen.print(f"{path}: {_line(kept.show(name))}")


@app.command("list")
def list_(context: typer.Context, folder: Folder, json: options.JsonFlag = False) -> None:
    """List the voices of a folder; a file that is none is named with the reason, and the exit code is 1."""
    from ..errors import VoiceFileError
    from ..upstream import voice_files

    screen = options.screen_of(context)
    found: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, path in voice_files.named_in(folder).items():
        try:
            found[name] = voice_files.read(path).summary()
        except VoiceFileError as error:
            wrong[name] = str(error)
    if json:
        screen.write_json({"voices": found, "unreadable": wrong}, "-")
    elif found:
        shown = table("", "voice", "family", "recording", "KiB", "made of")
        for name, about in found.items():
            size, seconds = f"{about['bytes'] / 1024:.0f}", f"{about['reference_seconds']:.1f} s"
            shown.add_row(name, about["family"], seconds, size, _source(about["source"]))
        screen.print(shown)
    elif not wrong:
        screen.note(f"{folder} has no voices")
    for reason in wrong.values():
        screen.error(reason)
    if wrong:
        raise typer.Exit(1)


@app.command()
def show(context: typer.Context, name: Name, folder: Folder, json: options.JsonFlag = False) -> None:
    """Show what a voice is: its family, size, and what it was made of."""
    screen = options.screen_of(context)
    about = _read(folder, name).summary()
    if json:
        screen.write_json({"name": name, **about}, "-")
        return
    for key, value in {**about, "source": _source(about["source"], whole=True)}.items():
        screen.print(f"{key.replace('_', ' ')}: {value}")


@app.command()
def export(
    context: typer.Context,
    name: Name,
    file: Annotated[Path, typer.Argument(help="Where to write it; a folder: under its name.")],
    folder: Folder,
    replace: Replace = False,
) -> None:
    """Copy one voice of the folder to a file."""
    named = _read(folder, name)
    target = _path(file, name) if file.is_dir() else file
    _write(options.screen_of(context), target, named, replace)


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A voice's file, or what upstream's Conditionals.save has written.")],
    folder: Folder,
    name: Annotated[str | None, typer.Option("--name", help="Of the voice; by default that of the file.")] = None,
    model: Annotated[
        ModelName | None,
        typer.Option("--model", help="Of upstream's file, which does not say it; by default by its prompt's length."),
    ] = None,
    replace: Replace = False,
) -> None:
    """Copy the voice of a file into the folder, checked; nothing is unpickled."""
    from ..upstream import voice_files

    screen = options.screen_of(context)
    name = _checked(file.stem if name is None else name)
    _check_free(folder, name, replace)
    named = voice_files.read_any(file, None if model is None else model.value)
    folder.mkdir(parents=True, exist_ok=True)
    _write(screen, _path(folder, name), named, replace)


@app.command()
def remove(context: typer.Context, name: Name, folder: Folder) -> None:
    """Delete a voice of the folder."""
    from ..upstream import voice_files

    path = voice_files.find(folder, name)
    voice_files.read(path)  # so that no file of something else is deleted
    path.unlink()
    options.screen_of(context).print(f"removed {path}")


def _checked(name: str) -> str:
    from ..errors import InvalidRequestError
    from ..runtime.voice import names

    try:
        return names.checked(name)
    except InvalidRequestError as error:
        raise typer.BadParameter(str(error)) from None


def _path(folder: Path, name: str) -> Path:
    from ..upstream import voice_files

    return voice_files.path_of(folder, name)


def _read(folder: Path, name: str) -> NamedVoice:
    from ..upstream import voice_files

    return voice_files.read(voice_files.find(folder, name))


def _check_free(folder: Path, name: str, replace: bool) -> None:
    """Raise before the long work where the name is taken."""
    from ..runtime.voice import names
    from ..upstream import voice_files

    others = voice_files.named_in(folder) if folder.exists() else {}
    taken = next((other for other in others if names.folded(other) == names.folded(name)), None)
    if taken is not None and not (replace and taken == name):
        raise typer.BadParameter(f"there is a voice {taken!r} in {folder} already: choose another name, or --replace.")


def _write(screen: Screen, path: Path, named: NamedVoice, replace: bool) -> None:
    from ..upstream import voice_files

    if path.exists() and not replace:
        raise typer.BadParameter(f"{path} is there already: choose another name, or --replace.")
    voice_files.write(path, named)
    screen.print(f"{path}: {_line(named.summary())}")


def _line(about: dict[str, Any]) -> str:
    return f"a voice of {about['family']}, {about['bytes'] / 1024:.0f} KiB, made of {_source(about['source'])}"


def _source(source: dict[str, Any], whole: bool = False) -> str:
    kind = source.get("kind", "?")
    if kind == "recording":
        digest = str(source.get("sha256", ""))
        return f"a recording (SHA-256 {digest if whole else digest[:12]})"
    if kind == "blend" and isinstance(source.get("of"), dict):
        return "a blend of " + ", ".join(f"{share:.0%} {name}" for name, share in source["of"].items())
    return str(kind)
