"""The folder of a reading that is not finished: what was read, and the pieces that are done.

    reading.json     what is read, by which model, how: a reading goes on only with the same
    00003-07.wav     the eighth piece of the fourth wave: marked, at its level, with the pause behind it
    00003.json       what is known of the pieces of that wave; without it the wave is not done

Each file appears whole or not at all, the JSON of a wave after its pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidRequestError, TurboError, brief
from .files import write_json, write_piece

MANIFEST, LOCK = "reading.json", "lock"
OWN = (MANIFEST, "[0-9]*.wav", "[0-9]*.json", ".*.partial")
SHOWN = 4  # differences in a message

with suppress(ImportError):
    import fcntl


class PartsFolder:
    """The pieces of one reading in a folder, which one process at a time works in.

    Args:
        path: of the folder; made by ``held``.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def started(self) -> bool:
        """Whether there is a reading to go on with."""
        return (self.path / MANIFEST).exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder for this process alone, and gone afterwards if nothing was begun in it.

        Raises:
            InvalidRequestError: another process has it, or it cannot be made.
        """
        locks = "fcntl" in globals()
        try:
            self.path.mkdir(exist_ok=True)
            # where there are no such locks (Windows) an open file could not be deleted
            lock = (self.path / LOCK).open("ab") if locks else nullcontext()
        except OSError as error:
            raise InvalidRequestError(f"{self.path} cannot be made: {error.strerror or error}.") from error
        with lock:
            if locks:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise InvalidRequestError(
                        f"Another process is reading into {self.path}.", "", "Wait for it, or name another output."
                    ) from None
            try:
                yield
            finally:
                if not self.started:
                    self.remove()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Go on with what is here, or start.

        Args:
            identity: what must be the same for the pieces to fit: JSON.

        Raises:
            InvalidRequestError: what is here is another reading; the message says what differs.
        """
        identity = json.loads(json.dumps(identity, default=str))
        if not self.started:
            self.empty()
            write_json(self.path / MANIFEST, identity)
            return
        try:
            before = json.loads((self.path / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise TurboError(f"{self.path / MANIFEST} cannot be read: {error}.", "", RESTART) from error
        if found := differences(before, identity):
            shown = "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
            raise InvalidRequestError(f"{self.path} holds pieces of another reading:", f"{shown}.", RESTART)

    def waves(self) -> list[list[dict[str, Any]]]:
        """What is known of the pieces of each wave that is done, from the first one on to where one is missing."""
        found: list[list[dict[str, Any]]] = []
        while True:
            try:
                wave = json.loads((self.path / f"{len(found):05d}.json").read_bytes())
                sizes = [(self.path / one["file"]).stat().st_size for one in wave]
            except (OSError, ValueError):
                return found
            if sizes != [44 + 2 * one["samples"] for one in wave]:  # the header of a WAV file, and 16 bits a sample
                return found
            found.append(wave)

    def keep(self, number: int, pieces: list[tuple[np.ndarray, dict[str, Any]]], rate: int) -> list[dict[str, Any]]:
        """Write a wave: samples (n,) int16 of each piece, and what is known of it. Returns that, with file and samples.

        Raises:
            TurboError: it cannot be written; what was here stays.
        """
        wave = []
        for index, (samples, known) in enumerate(pieces):
            file = f"{number:05d}-{index:02d}.wav"
            write_piece(self.path / file, samples, rate)
            wave.append({"file": file, "samples": len(samples), **known})
        write_json(self.path / f"{number:05d}.json", wave)
        return wave

    def remove(self) -> None:
        """All that is this package's, and the folder where nothing else is in it."""
        self.empty()
        with suppress(OSError):
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    def empty(self) -> None:
        """Drop all pieces, and what they were of."""
        for pattern in OWN:  # the manifest first: what is left of a folder without one is no reading
            for file in self.path.glob(pattern):
                with suppress(OSError):
                    file.unlink()


RESTART = "Use another output, or start again with --restart (restart=True), which drops those pieces."


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """``name is 1 (it was 0)`` for each value that differs, in dicts of dicts."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*now, *(key for key in before if key not in now)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name} is {brief(now)} (it was {brief(before)})"]
