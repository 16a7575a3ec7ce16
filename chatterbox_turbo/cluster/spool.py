"""What actors have done and begun, in a folder that survives them and the driver: ``.spool``, beside the audio.

An actor leaves a record for each line that it has finished, and a mark for each that it has begun. Who speaks a batch
that another one has begun leaves out what is finished, and speaks alone what may have ended the other's process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..speech.files import write_json
from ..speech.lines import Line

FOLDER = ".spool"
DESK, LINES = "desk-", ".lines"
FORGOTTEN = 86_400.0  # seconds after which nobody comes back to a desk


class Spool:
    """Of one folder of audio files; other jobs may have theirs in the same folder.

    Args:
        ending: of the audio files, ``wav`` or ``flac``: what is finished as one is not as the other.
    """

    def __init__(self, folder: Path, ending: str):
        self._audio, self._folder, self._ending = folder, folder / FOLDER, ending

    # -- for the driver

    def open(self) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def left_over(self, lines: Iterable[Line]) -> Iterator[tuple[Line, dict[str, Any]]]:
        """Those of the lines that an earlier job has finished, with their records."""
        present = {*os.listdir(self._folder)}
        for line in lines:
            if f"{self._key(line)}.json" in present and (record := self.record(line)) is not None:
                yield line, record

    def forget(self, line: Line) -> None:
        """Its record is elsewhere by now."""
        for ending in ("json", "begun"):
            (self._folder / f"{self._key(line)}.{ending}").unlink(missing_ok=True)

    def clear(self, lines: Iterable[Line]) -> None:
        """All records of the lines are elsewhere; the folder stays where another job has something in it."""
        own = {self._key(line) for line in lines}
        for path in self._folder.iterdir():
            if path.name.partition(".")[0] in own:
                path.unlink(missing_ok=True)
        for desk in self._folder.glob(f"{DESK}*"):  # of actors that have ended
            with suppress(OSError):
                if own & {*(desk / LINES).read_text().split()} or time.time() - desk.stat().st_mtime > FORGOTTEN:
                    shutil.rmtree(desk, ignore_errors=True)
        with suppress(OSError):
            self._folder.rmdir()

    # -- for an actor

    def record(self, line: Line) -> dict[str, Any] | None:
        """Of a line that is finished."""
        try:
            record = json.loads((self._folder / f"{self._key(line)}.json").read_bytes())
        except FileNotFoundError:
            return None
        spoken = record["error"] is None
        return record if not spoken or (self._audio / record["file"]).is_file() else None

    def begun(self, line: Line) -> int:
        """How often it was begun."""
        try:
            return (self._folder / f"{self._key(line)}.begun").stat().st_size
        except FileNotFoundError:
            return 0

    def begin(self, line: Line) -> None:
        """Mark it."""
        with (self._folder / f"{self._key(line)}.begun").open("ab") as file:
            file.write(b".")

    def unbegin(self, line: Line) -> None:
        """Take the marks back: what kept it from its end has been told, and was no process that ended."""
        (self._folder / f"{self._key(line)}.begun").unlink(missing_ok=True)

    @contextmanager
    def desk(self, lines: Iterable[Line]) -> Iterator[Path]:
        """A folder of this process alone for files of lines that are not finished: another one may write the same."""
        desk = self._folder / f"{DESK}{uuid.uuid4().hex}"
        desk.mkdir()
        try:
            (desk / LINES).write_text("\n".join(map(self._key, lines)))
            yield desk
        finally:
            shutil.rmtree(desk, ignore_errors=True)

    def finish(self, line: Line, record: Mapping[str, Any], desk: Path) -> None:
        """Put a line's file in its place, and leave its record.

        Raises:
            TurboError: it cannot be written.
        """
        if record["error"] is None:
            os.replace(desk / record["file"], self._audio / record["file"])
        temporary = desk / f"{self._key(line)}.json"
        write_json(temporary, record)
        os.replace(temporary, self._folder / temporary.name)

    def _key(self, line: Line) -> str:
        name = f"{line.name}.{self._ending}\0{line.digest}"
        return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:32]
