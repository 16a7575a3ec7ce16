"""A job on Ray Data: lines to audio files, by actors that each load a model once.

Ray gives the batches to actors, starts actors again that have ended, and gives their batches to others. What it
cannot know is in the ``Spool``: which lines of such a batch are finished, and which have been there at every end.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidRequestError, TurboError, describe
from ..runtime.arguments import count
from ..speech.lines import Line, failed, speak_lines
from .packing import batches
from .ray_itself import connect, imported, may_grow
from .spool import Spool

logger = logging.getLogger(__name__)

SLOTS = 8  # lines that an actor decodes at once
ALONE = 2  # times that a line was begun and not finished, from which on it is spoken beside no other
MOST = 4  # and from which on it is not spoken any more
GO_ON = "What is finished is kept: do the same again."


def speak(
    lines: Sequence[Line],
    folder: Path,
    load: Callable[[], Any],
    *,
    ending: str = "wav",
    slots: int = SLOTS,
    times: bool = False,
    actors: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Generator[tuple[Line, dict[str, Any]], None, None]:
    """Each line with its record (as of ``speech.lines.speak_lines``), a batch after the other.

    There is exactly one file a line afterwards, whatever ends meanwhile: an actor, or this process, whose next call
    with the same lines goes on. Runs on the Ray that this process is connected to, else on one of its own.

    Args:
        lines: no two of one name.
        folder: for the files; every machine sees it under this path.
        load: gives the optimized model; pickled, and called once an actor.
        ending: ``wav`` or ``flac``.
        slots: lines that an actor decodes at once.
        times: also of sentences and words.
        actors: how many; by default as many as Ray has room for, and batches to give them.
        cpus, gpus: that an actor holds.

    Raises:
        InvalidRequestError: an argument is out of range, or Ray has no room for one actor.
        TurboError: Ray is not installed or does not answer; a model cannot be loaded; a file cannot be written.
    """
    ray = imported("data")
    count("slots", slots)
    folder = folder.resolve()
    spool = Spool(folder, ending)
    spool.open()
    left = {line.name: line for line in lines}
    for line, record in spool.left_over(lines):
        del left[line.name]
        yield line, record
    if left:
        number = _actors(ray, actors, cpus, gpus)
        work = batches([*left.values()], number, slots)
        rows = [{"lines": pickle.dumps(one)} for one in work]
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Speaker,
            fn_constructor_args=(load, folder, ending, slots, times),
            batch_size=None,
            # one batch after the other, or the last ones would wait for each other
            compute=ray.data.ActorPoolStrategy(size=min(number, len(rows)), max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        stopped = None
        try:
            # to its end, whatever it says: of a reader that leaves Ray's threads and actors stay
            for row in data.iter_rows():
                record = pickle.loads(row["record"])
                if isinstance(record, TurboError):
                    stopped = stopped or record
                # of a batch that was given to two, one comes first
                elif (line := left.pop(record["id"], None)) is not None:
                    yield line, record
                    spool.forget(line)
        except ray.exceptions.RayError as error:
            raise TurboError(f"The job on Ray failed: {describe(error)}.", "", GO_ON) from error
        except BaseException:  # whoever has the lines has enough of them, or is interrupted
            _end(data)
            raise
        if stopped is not None:
            raise stopped
    if left:
        raise TurboError(f"{len(left)} lines were lost.", "Ray has ended the job before its end.", "Do the same again.")
    spool.clear(lines)


class Speaker:
    """One model, for one batch after the other; an actor's class."""

    def __init__(self, load: Callable[[], Any], folder: Path, ending: str, slots: int, times: bool):
        self._load, self._ending, self._slots, self._times = load, ending, slots, times
        self._spool, self._model = Spool(folder, ending), None
        self._stopped: TurboError | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``lines``: pickled, of a batch each, to ``record``: pickled, of a line each, or the error that ends it.

        After such an error each batch has the same at once.
        """
        records: list[Any] = []
        try:
            if self._stopped is None:
                for lines in batch["lines"]:
                    records += self._records(pickle.loads(lines))
        except TurboError as error:  # Ray would hand on its text alone
            self._stopped = error
        except Exception as error:  # and of others the beginning of a traceback
            logger.exception("A batch failed.")
            self._stopped = TurboError(f"An actor failed: {describe(error)}.", "", GO_ON)
        if self._stopped is not None:
            records = [self._stopped]
        return {"record": np.array([pickle.dumps(one) for one in records], dtype=object)}

    @contextmanager
    def _told(self, lines: Sequence[Line]) -> Iterator[None]:
        """An error that ends the job leaves no mark: or lines would fail once it has been mended."""
        try:
            yield
        except Exception:  # whatever it is, this process has not ended
            for line in lines:
                self._spool.unbegin(line)
            raise

    def _records(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        found = {line.name: self._spool.record(line) for line in lines}
        left = [line for line in lines if found[line.name] is None]

        def finish(line: Line, record: dict[str, Any]) -> None:
            self._spool.finish(line, record, desk)
            found[line.name] = record

        begun = {line.name: self._spool.begun(line) for line in left}
        together = [line for line in left if begun[line.name] < ALONE]
        alone = [[line] for line in left if ALONE <= begun[line.name] < MOST]
        with self._spool.desk(left) as desk, self._told(left):
            for line in left:
                if begun[line.name] >= MOST:
                    why = f"the process that speaks it has ended {begun[line.name]} times"
                    finish(line, failed(line, self._ending, why))
            for group in filter(None, (together, *alone)):
                for line in group:
                    self._spool.begin(line)
                # only now: whoever ends while it loads has begun something, and does not begin it for ever
                self._model = self._model or self._load()
                for line, record in speak_lines(self._model, group, desk, self._ending, self._slots, self._times):
                    finish(line, record)
        return [*found.values()]


def _end(data: Any) -> None:
    """Give the actors of a dataset back that nobody reads on; Ray does so only when the dataset is garbage."""
    executor = getattr(data, "_current_executor", None)  # nothing public ends it
    if executor is not None:
        executor.shutdown(force=True)


def _actors(ray: Any, asked: int | None, cpus: float, gpus: float) -> int:
    """How many there are to be.

    Raises:
        InvalidRequestError: there is no room for one, and none to come: Ray would wait for ever.
    """
    connect(ray)
    there = ray.cluster_resources()
    room = [there.get(name, 0.0) / each for name, each in (("CPU", cpus), ("GPU", gpus)) if each]
    if asked is not None and may_grow(ray):
        return count("actors", asked)
    if room and min(room) < 1:
        raise InvalidRequestError(
            f"Ray has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, "
            f"and an actor asks for {cpus:g} and {gpus:g}."
        )
    return int(min(room, default=1)) if asked is None else count("actors", asked)
