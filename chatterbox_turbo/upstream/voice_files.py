"""Files of voices: ``<name>.safetensors`` with what there is to know in its header, and upstream's ``conds.pt``.

Nothing is unpickled but by torch's ``weights_only``, from the archive that ``Conditionals.save`` writes.
"""

from __future__ import annotations

import io
import json
import os
import uuid
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..config.messages import nearest
from ..errors import LONG, VoiceFileError, brief, describe
from ..runtime.voice import names
from .families import FAMILIES
from .voices import NamedVoice, cleaned, named_tensors

SUFFIX = ".safetensors"
KEY, VERSION = "chatterbox_turbo_voice", 1
LARGEST = 64 * 2**20  # bytes of a file: a voice of ten seconds has 0.2 MB
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
AGAIN = "Copy it again, or make the voice again from its recording."


def path_of(folder: Path, name: str) -> Path:
    """The file of a voice in a folder."""
    return folder / f"{name}{SUFFIX}"


def named_in(folder: Path) -> dict[str, Path]:
    """Files of a folder that may be voices, by name.

    Raises:
        VoiceFileError: there is no such folder.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise VoiceFileError(
            f"The folder of voices {_shown(folder)} cannot be read: {error.strerror or error}.", "", "Check the path."
        ) from None
    return {path.stem: path for path in found if path.suffix == SUFFIX and path.name[0] != "."}


def find(folder: Path, name: str) -> Path:
    """The file of a voice of a folder.

    Raises:
        VoiceFileError: there is none, or no such folder.
    """
    found = {names.composed(stem): path for stem, path in named_in(folder).items()}
    path = found.get(names.composed(name))
    if path is None:
        raise VoiceFileError(f"There is no voice {brief(name)} in {_shown(folder)}{nearest(name, found)}.")
    return path


def write(path: Path, named: NamedVoice) -> None:
    """Write a voice, as a whole or not at all; a file that is there is replaced.

    Raises:
        VoiceFileError: the disk is full, or the folder cannot be written.
    """
    from safetensors.torch import save

    about = {
        "version": VERSION,
        "family": named.family,
        "sample_rate": named.sample_rate,
        "source": dict(named.source),
        "digest": named.digest,
        "package": named.package,
    }
    content = save(named_tensors(named.voice), {KEY: json.dumps(about, ensure_ascii=False)})
    # beside it, so that it can take its place; hidden, so that nobody takes it for a voice
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise VoiceFileError(f"The voice cannot be written to {_shown(path)}: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):
            part.unlink()


def read(path: Path) -> NamedVoice:
    """The voice that ``write`` has written.

    Raises:
        VoiceFileError: there is none, it is something else, damaged, or of a newer version of this package.
    """
    return _read(path, _content(path))


def read_any(path: Path, family: str | None = None) -> NamedVoice:
    """A voice's file, or what upstream's ``Conditionals.save`` has written, told apart by content.

    Args:
        family: of upstream's file, which does not say it; ``None``: by the length of its prompt.

    Raises:
        VoiceFileError: as in ``read``; or a pickle that holds something else, which is not unpickled.
    """
    content = _content(path)
    if content[:4] == _ZIP:
        return _read_upstreams(path, content, family)
    if content[:1] == _PICKLE:
        raise VoiceFileError(
            f"{_shown(path)} is a pickle, which is not opened.",
            "A pickle can run anything. Upstream's Conditionals.save writes an archive that torch reads safely.",
            "Save the voice with model.conds.save(path), or make it again from its recording.",
        )
    return _read(path, content)


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise VoiceFileError(f"{_shown(path)} is no voice: it is not a file.", "", "Check the path.")
        if size > LARGEST:
            raise VoiceFileError(
                f"{_shown(path)} is no voice: it has {size:,} bytes, and a voice some 200,000.", "", "Check the path."
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise VoiceFileError(f"There is no voice file {_shown(path)}.", "", "Check the path.") from None
    except OSError as error:
        raise VoiceFileError(f"{_shown(path)} cannot be read: {error.strerror or error}.") from None


def _read(path: Path, content: bytes) -> NamedVoice:
    from safetensors import SafetensorError
    from safetensors.torch import load

    header = _header(path, content)
    about = _about(path, header)
    try:
        voice = _voice(load(content))
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, describe(error)) from None
    named = NamedVoice(voice, about["family"], about["source"], about["sample_rate"], about["package"])
    if named.digest != about["digest"]:
        raise _damaged(path, "its content is not what was written (SHA-256)")
    return named


def _header(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON that a safetensors file begins with."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or content[8:9] != b"{" or size > LARGEST:
        raise VoiceFileError(
            f"{_shown(path)} is no voice: it is not a safetensors file.",
            "",
            "A recording is made a voice by add(name, audio), or `chatterbox-turbo voices add`.",
        )
    if len(content) < 8 + size:
        raise _damaged(path, f"it ends after {len(content):,} bytes, within its header")
    try:
        return json.loads(content[8 : 8 + size])
    except ValueError as error:
        raise _damaged(path, f"its header is no JSON ({error})") from None


def _about(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """What the header says of the voice, checked."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or KEY not in metadata:
        raise VoiceFileError(
            f"{_shown(path)} is no voice: it is a safetensors file of something else.",
            f"Its header has no {KEY}.",
        )
    try:
        about = json.loads(metadata[KEY])
    except ValueError as error:
        raise _damaged(path, f"what its header says of the voice is no JSON ({error})") from None
    if not isinstance(about, dict):
        raise _damaged(path, f"what its header says of the voice is {brief(about)}")
    version = about.get("version")
    if isinstance(version, int) and version > VERSION:
        raise VoiceFileError(
            f"{_shown(path)} is of format {version}, and this package reads format {VERSION}.",
            f"It was written by chatterbox-turbo {brief(about.get('package'))}; this is {__version__}.",
            "Install a newer chatterbox-turbo, or make the voice again from its recording.",
        )
    kinds = {"version": int, "family": str, "source": dict, "sample_rate": int, "package": str, "digest": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
    if wrong or version != VERSION or about["family"] not in FAMILIES:
        what = f"its header is wrong about {', '.join(wrong) or ('version' if version != VERSION else 'family')}"
        raise _damaged(path, what)
    return about


def _voice(tensors: dict[str, Tensor]) -> Any:
    found: dict[str, dict[str, Tensor]] = {"t3": {}, "gen": {}}
    for name, tensor in tensors.items():
        half, _, rest = name.partition(".")
        found[half][rest] = tensor
    return cleaned(**found)


def _read_upstreams(path: Path, content: bytes, family: str | None) -> NamedVoice:
    what, remedy = "", "Save the voice with model.conds.save(path)."
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST:
            what = f"unpacked it has {size:,} bytes, and a voice some 200,000"
        else:
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if not (
                isinstance(saved, dict) and isinstance(saved.get("t3"), dict) and isinstance(saved.get("gen"), dict)
            ):
                what = f"it holds {brief(saved)}, and a voice is a dict of t3 and gen"
    except Exception as error:  # of torch, pickle and zipfile, as many kinds as files can be damaged in
        what = describe(error)
        if "weights_only" in what or "Unsupported" in what:
            what = "it holds more than tensors, and was not unpickled"
    if what:
        raise VoiceFileError(f"{_shown(path)} is not what Conditionals.save writes: {what}.", "", remedy)
    try:
        voice = cleaned(saved["t3"], saved["gen"])
    except ValueError as error:
        raise VoiceFileError(f"{_shown(path)} is no voice: {error}.", "", AGAIN) from None
    return NamedVoice(voice, family or _guessed(path, voice))


def _guessed(path: Path, voice: Any) -> str:
    """English and Multilingual share voices; a prompt of 15 s is Turbo's (or Nano's: name it)."""
    tokens = voice.t3.get("cond_prompt_speech_tokens")
    known = {0: "vc", 150: "english", 375: "turbo"}
    count = 0 if tokens is None else tokens.shape[1]
    if count not in known or (voice.t3 and tokens is None):
        raise VoiceFileError(
            f"{_shown(path)} does not say of which model it is.",
            f"Its prompt has {count} speech tokens; 150 are English's and Multilingual's, 375 Turbo's and Nano's.",
            "Name the model.",
        )
    return known[count]


def _damaged(path: Path, how: str) -> VoiceFileError:
    return VoiceFileError(f"The voice file {_shown(path)} is damaged: {how}.", "", AGAIN)


def _shown(path: Path) -> str:
    return brief(str(path), LONG)
