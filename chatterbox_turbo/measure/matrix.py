"""Configurations side by side: memory, speed and quality of each, in a process of its own.

Upstream's process stays, and speaks in turns with each of the others: a machine that drifts favours neither side.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import OptimizationConfig
from .worker import Failure, Job, serve

UPSTREAM = "upstream"
KILLED = -9  # by the system, which takes the largest process where memory has run out


@dataclass(frozen=True)
class Row:
    """One configuration. Sizes are bytes.

    Attributes:
        failure: why there are no figures, or an empty string.
        imports: in use before the model was loaded; 0 on a GPU.
        weights: of the tensors of the model's parts, wherever they are.
        runs: ``Run.to_dict`` of each; ``turns``: seconds of upstream beside them.
        quality: ``Quality`` as plain values, where there is an upstream to compare with.
        notes: what the configuration asked for and did not get.
    """

    name: str
    failure: str = ""
    imports: int = 0
    weights: int = 0
    apply_seconds: float = 0.0
    promise: str | None = None
    passes: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def resident(self) -> int | None:
        """In use while the model speaks, without the imports: median while T3 decodes, or flow matching without it."""
        found = [run["memory"].get("t3") or run["memory"].get("flow") for run in self.runs]
        medians = [phase["median"] for phase in found if phase]
        return int(statistics.median(medians)) - self.imports if medians else None

    @property
    def peak(self) -> int | None:
        """In use at most during a request, without the imports."""
        if not self.runs:
            return None
        return int(statistics.median(run["peak_memory"] for run in self.runs) * 2**20) - self.imports

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of computation for a second of speech."""
        return statistics.median(run["real_time_factor"] for run in self.runs) if self.runs else None

    @property
    def speed(self) -> float | None:
        """Upstream's time over this one's, the median of pairs."""
        pairs = zip(self.turns, self.runs, strict=False)
        ratios = [turn / run["end_to_end"] for turn, run in pairs]
        return statistics.median(ratios) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = ("resident", "peak", "real_time_factor", "speed")
        return {**asdict(self), **{name: getattr(self, name) for name in figures}}


class EndedError(Exception):
    """A process could not do what it was asked to."""

    def __init__(self, reason: str, out_of_memory: bool):
        super().__init__(reason)
        self.out_of_memory = out_of_memory


class Process:
    """The other end of ``worker.serve``; a context that ends it.

    Raises:
        EndedError: it has failed, here or when it is asked.
    """

    def __init__(self, job: Job):
        context = multiprocessing.get_context("spawn")  # a forked child would have this process's memory
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, job), daemon=True)
        self._process.start()
        other.close()
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, name: str, *arguments: Any) -> Any:
        """What a method of ``Worker`` returns."""
        try:
            self._pipe.send((name, arguments))
        except OSError:
            self._ended()
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._ended()
        if isinstance(answer, Failure):
            raise EndedError(answer.reason, answer.out_of_memory)
        return answer

    def _ended(self) -> None:
        self._process.join(10)
        code = self._process.exitcode
        reason = "ended by the system, probably for want of memory" if code == KILLED else f"ended with code {code}"
        raise EndedError(f"its process was {reason}", code == KILLED)

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._pipe.close()
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Matrix:
    """Measures upstream, then configurations beside it. A context that ends its processes.

    Args:
        job: the process of a configuration; ``None`` is upstream.
        runs: requests that are timed, of each.
        announce: called with a line before each step.
    """

    def __init__(
        self,
        job: Callable[[OptimizationConfig | None], Job],
        runs: int = 1,
        announce: Callable[[str], None] = lambda step: None,
    ):
        self._job, self._runs, self._announce = job, runs, announce
        self._upstream: Process | None = None
        self._reference: bytes | None = None  # pickled
        self._seconds: list[float] = []  # of upstream alone

    def rows(self, configs: Mapping[str, OptimizationConfig | None]) -> Iterator[Row]:
        """A row as soon as it is measured, upstream's first; one that fails has the reason.

        Args:
            configs: by name; ``None`` is upstream, which runs in any case.
        """
        first = next((name for name, config in configs.items() if config is None), UPSTREAM)
        yield self._first(first)
        self._ask_for_reference(first)
        for name, config in configs.items():
            if config is not None:
                yield self._row(name, config)

    def _first(self, name: str) -> Row:
        self._announce(f"{name}: loading")
        row = Row(name)
        try:
            self._upstream = Process(self._job(None))
            row = _with_facts(row, self._upstream.facts)
            self._announce(f"{name}: speaking")
            runs = [self._upstream.ask("speak") for _ in range(self._runs)]
            self._seconds = [run["end_to_end"] for run in runs]
            return replace(row, runs=runs, turns=self._seconds)
        except EndedError as error:
            self._stop_upstream()
            return replace(row, failure=str(error))

    def _ask_for_reference(self, name: str) -> None:
        if self._upstream is None:
            return
        self._announce(f"{name}: as the reference of the others")
        try:
            self._reference = self._upstream.ask("reference")
        except EndedError:
            self._stop_upstream()

    def _row(self, name: str, config: OptimizationConfig) -> Row:
        try:
            return self._measure(name, config)
        except EndedError as error:
            if not error.out_of_memory or self._upstream is None:
                return Row(name, failure=str(error))
        self._announce(f"{name}: no room beside upstream, once more without it")
        self._stop_upstream()
        try:
            row = self._measure(name, config)
        except EndedError as error:
            return Row(name, failure=str(error))
        return replace(row, notes=[*row.notes, "no room beside upstream: not in turns, so that the ratio is rougher"])

    def _measure(self, name: str, config: OptimizationConfig) -> Row:
        self._announce(f"{name}: loading")
        with Process(self._job(config)) as process:
            row, runs, turns = _with_facts(Row(name), process.facts), [], []
            for number in range(1, self._runs + 1):
                self._announce(f"{name}: speaking, run {number} of {self._runs}")
                if number % 2:
                    runs.append(process.ask("speak"))
                turns += self._turn(number)
                if not number % 2:
                    runs.append(process.ask("speak"))
            row = replace(row, runs=runs, turns=turns)
            if self._reference is not None:
                self._announce(f"{name}: quality")
                row = replace(row, quality=process.ask("quality", self._reference))
            return row

    def _turn(self, number: int) -> list[float]:
        if self._upstream is None:
            return self._seconds[number - 1 : number]
        try:
            return [self._upstream.ask("speak")["end_to_end"]]
        except EndedError:
            self._stop_upstream()
            return self._seconds[number - 1 : number]

    def _stop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        self._upstream = None

    def __enter__(self) -> Matrix:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_upstream()


def _with_facts(row: Row, facts: Mapping[str, Any]) -> Row:
    return replace(row, **facts)
