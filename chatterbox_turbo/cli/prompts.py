"""Lines of JSON, or rows of a Parquet file, that say what is spoken: all are looked at before anything is."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any

from ..config.messages import nearest
from ..errors import InvalidRequestError, brief, describe
from ..runtime.voice import names
from ..speech.lines import Line
from .voice_folder import VoiceFolder

SHOWN = 5  # mistakes in a message
_VOICE = frozenset({"voice", "audio_prompt_path"})
OWN = ("id", "text", "voice", "seed")
_REFUSED = re.compile(r'[\x00-\x1f<>:"/\\|?*\x7f]')  # by one file system or another
LONGEST = 200  # bytes of a file's name, without its ending


def digest_of(line: Line, *others: Any, voices: Mapping[str, str] = MappingProxyType({})) -> str:
    """What the audio of a line depends on, told in 16 characters; a recording by its size and when it was changed.

    ``voices``: digests of named voices.
    """
    found = {**line.item}
    if "voice" in found:
        found["voice"] = [found["voice"], voices[found["voice"]]]
    if path := found.get("audio_prompt_path"):
        about = Path(path).stat()
        found["audio_prompt_path"] = [str(path), about.st_size, about.st_mtime_ns]
    data = json.dumps([found, *others], sort_keys=True, default=str)
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def arguments_of(generate: Any) -> tuple[str, ...]:
    """Names of the arguments of a model's ``generate``."""
    return tuple(list(inspect.signature(generate).parameters)[1:])


def read_prompts(
    path: Path,
    arguments: Iterable[str],
    seed: int,
    defaults: Mapping[str, Any],
    languages: Iterable[str] = (),
    voices: VoiceFolder | None = None,
) -> list[Line]:
    """The lines of a file: JSON in UTF-8, empty lines left out; or Parquet, whose columns are a line's keys.

    Args:
        arguments: names that a line may have beside ``id``, ``text``, ``seed`` and ``voice`` (a name that ``voices``
            has; else a recording, which is ``audio_prompt_path`` by another name).
        seed: a line's own is this and its number, where it has none.
        defaults: arguments that a line may leave out.
        languages: that ``language_id`` may be; any where there are none.
        voices: what ``voice`` may name; nothing by default.

    Raises:
        InvalidRequestError: lines are wrong; the message has the first of them, each with its number.
    """
    known = tuple(dict.fromkeys((*OWN, *arguments)))
    voices = voices or VoiceFolder(None)
    found: list[Line] = []
    wrong: list[str] = []
    used: dict[str, int] = {}
    for number, row in _rows(path):
        try:
            values = _object(row) if isinstance(row, str) else row
            name = _name(values.pop("id", number))
            values = _item(values, known, set(languages), voices)
            rest = defaults if _VOICE.isdisjoint(values) else {k: v for k, v in defaults.items() if k not in _VOICE}
            item = {"seed": seed + number, **rest, **values}
            if (first := used.setdefault(name.casefold(), number)) != number:
                raise ValueError(f"the id {brief(name)} is that of line {first} too")
            found.append(Line(number, name, item))
        except ValueError as error:
            wrong.append(f"line {number}: {str(error).rstrip('.')}")
    if wrong:
        rest = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InvalidRequestError(f"{path}: {'; '.join(wrong[:SHOWN])}{rest}.", "", "Nothing has been spoken.")
    if not found:
        raise InvalidRequestError(f"{path} has no lines.", "", 'One a line: {"text": "..."}.')
    return found


def _rows(path: Path) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """Lines with their numbers, from 1 on; of Parquet what is not null."""
    if path.suffix.lower() == ".parquet":
        for number, row in enumerate(_table(path), 1):
            yield number, {name: value for name, value in row.items() if value is not None}
        return
    content = path.read_bytes()
    try:
        lines = content.decode("utf-8-sig").split("\n")  # JSON may hold other separators of lines as they are
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise InvalidRequestError(f"{path}: line {number}: not in UTF-8: {error.reason}.") from error
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidRequestError(
            f"{path} cannot be read: {error}.", "", "Parquet needs pip install 'chatterbox-turbo[ray]'."
        ) from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidRequestError(f"{path} is no Parquet file: {describe(error)}.") from error


def _object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line, parse_constant=_no_number, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at character {error.colno}") from None
    except RecursionError:
        raise ValueError("no JSON: nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f'{brief(values)} is no object: {{"text": "..."}}')
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{brief(next(name for name in names if names.count(name) > 1))} is there twice")
    return values


def _name(value: Any) -> str:
    """The name of a file."""
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the id is {brief(value)}: it names a file")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"the id {brief(name)} has half of a character, which no file's name can have")
    if names.is_device(name):
        raise ValueError(f"the id {brief(name)} is a name that Windows keeps for a device")
    if _REFUSED.search(name) or name[0] in ". " or name[-1] in ". " or len(name.encode()) > LONGEST:
        raise ValueError(f"the id {brief(name)} is no name of a file: letters, digits, - and _ are")
    return name


def _item(values: dict[str, Any], known: tuple[str, ...], languages: set[str], voices: VoiceFolder) -> dict[str, Any]:
    """Values that have been looked at, by the names of ``generate``."""
    for name in values:
        if name not in known:
            raise ValueError(f"unknown key {brief(name)}{nearest(name, known)}")
    text = values.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text is {brief(text)}" if "text" in values else "there is no text")
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"the seed is {brief(seed)}: a whole number from 0 on")
    if "voice" in values:
        if "audio_prompt_path" in values:
            raise ValueError("voice and audio_prompt_path mean the same: give one")
        voice = values.pop("voice")
        if not isinstance(voice, str | NoneType):
            raise ValueError(f"the voice is {brief(voice)}: a name, or the path of a recording")
        values |= {"audio_prompt_path": None} if voice is None else voices.argument(voice)
    recording = values.get("audio_prompt_path")
    if recording is not None and not (isinstance(recording, str) and Path(recording).is_file()):
        raise ValueError(f"there is no recording {brief(recording)}")
    language = values.get("language_id")
    if language is not None and languages and str(language).lower() not in languages:
        raise ValueError(f"unknown language {brief(language)}; the model speaks {', '.join(sorted(languages))}")
    return values
