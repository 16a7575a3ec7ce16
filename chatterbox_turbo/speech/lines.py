"""Lines that are spoken into a file each, with a record of what became of them, by one process or by many."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"  # in the folder of the files


@dataclass(frozen=True)
class Line:
    """What is to be spoken.

    Attributes:
        number: of the line, from 1 on.
        name: of its file, without the ending.
        item: of a batch (``model.turbo.batch``).
        digest: of everything that its audio depends on.
    """

    number: int
    name: str
    item: Mapping[str, Any]
    digest: str = ""


def speak_lines(
    model: Any, lines: Sequence[Line], folder: Path, ending: str, slots: int | None = None, times: bool = False
) -> Generator[tuple[Line, dict[str, Any]], None, None]:
    """Each line with its record, once its file is in ``folder``, in the order in which they are finished.

    A record has ``id``, ``line``, ``file``, ``seconds``, ``seed``, ``error`` (text, or ``None``) and ``digest``, with
    ``times`` also ``sentences`` and ``words``.

    Args:
        ending: ``wav`` or ``flac``.
        slots, times: as of ``model.turbo.as_completed``.

    Raises:
        TurboError: a file cannot be written.
    """
    series = model.turbo.as_completed((line.item for line in lines), slots, True, times)
    with closing(series):
        for number, result in series:
            yield lines[number], _kept(lines[number], result, folder, ending, model.sr)


def failed(line: Line, ending: str, error: str) -> dict[str, Any]:
    """The record of a line that has no file."""
    return {**_record(line, ending), "error": error, "digest": line.digest}


def _record(line: Line, ending: str) -> dict[str, Any]:
    name = f"{line.name}.{ending}"
    return {"id": line.name, "line": line.number, "file": name, "seconds": None, "seed": line.item.get("seed")}


def _kept(line: Line, result: Any, folder: Path, ending: str, rate: int) -> dict[str, Any]:
    from ..errors import describe
    from .files import audio_written
    from .times import TimedSpeech

    if isinstance(result, Exception):
        return failed(line, ending, describe(result))
    record = _record(line, ending)
    if isinstance(result, TimedSpeech):
        record["sentences"] = [_told(one) for one in result.sentences]
        record["words"] = [_told(one) for one in result.words]
        result = result.samples
    samples = result.squeeze(0).cpu().numpy()
    with audio_written(folder / record["file"], rate) as write:
        write(samples)
    return {**record, "seconds": len(samples) / rate, "error": None, "digest": line.digest}


def _told(one: Any) -> dict[str, Any]:
    """A sentence or word, in seconds."""
    return {"text": one.text, "start": round(one.start, 3), "end": round(one.end, 3), "source": one.source}


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


@contextmanager
def results_of(folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that adds a record to ``results.jsonl``.

    Raises:
        TurboError: it cannot be written.
    """
    from ..errors import TurboError
    from .files import KEPT

    path = folder / RESULTS

    @contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except OSError as full:
            raise TurboError(f"{path} cannot be written: {full.strerror or full}.", "", KEPT) from full

    def add(record: Mapping[str, Any]) -> None:
        left = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        with told():
            while left:  # a full disk takes a part
                left = left[results.write(left) :]

    with told():
        results = path.open("a+b", buffering=0)  # a buffer would be written once more, and fail, when it is closed
    with results:
        # a last line that an interruption has cut is ended, so that the next one is its own
        if results.seek(0, 2):
            results.seek(-1, 2)
            if results.read(1) != b"\n":
                with told():
                    results.write(b"\n")
        yield add
