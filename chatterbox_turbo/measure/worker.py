"""One configuration in a process of its own, which answers ``matrix`` through a pipe: its memory is nobody else's."""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..api import apply, inspect
from ..config import FIDELITIES, OptimizationConfig
from ..errors import describe
from ..memory import weights
from ..plan import Plan
from ..runtime.cpu.host_memory import give_back
from ..runtime.memory import readings
from ..runtime.memory.free_memory import is_out_of_memory
from ..upstream.families import identify
from .benchmark import Run, run, warm_up
from .beside import at_once
from .halves import quality_of, reference_of


@dataclass(frozen=True)
class Job:
    """What a process does. It is pickled, functions by their name.

    Attributes:
        prepare: imports what a model is made of.
        load: the model, by upstream's own loader where ``config`` is none.
        config: what is applied; none leaves the model upstream's.
        debug: whether what upstream prints is shown.
    """

    prepare: Callable[[], Any]
    load: Callable[[], Any]
    config: OptimizationConfig | None
    request: dict[str, Any]
    seed: int
    device: str
    debug: bool = False


@dataclass(frozen=True)
class Failure:
    """What a process says before it ends early."""

    reason: str
    out_of_memory: bool = False


class Worker:
    """A loaded model under one configuration."""

    def __init__(self, job: Job):
        self._job, device = job, torch.device(job.device)
        job.prepare()
        self._imports = readings.level(device)
        self._model = job.load()
        self._last: Run | None = None
        self._note, config = "", job.config
        if config is not None:
            config, self._note = at_once(identify(self._model), inspect(self._model, config), config, [job.request])
        start = time.perf_counter()
        if config is not None:
            apply(self._model, config)
        self._applied = time.perf_counter() - start
        warm_up(self._model, job.request)
        if job.config is not None and job.config.memory.chosen("clear") == "between":
            give_back()  # a warm-up is no request, after which the policy would do it

    def facts(self) -> dict[str, Any]:
        """What is there before the first request: bytes, the passes that run, and what is left out."""
        found = weights(identify(self._model))
        plan = getattr(getattr(self._model, "turbo", None), "plan", None)
        return {
            "imports": self._imports,
            "weights": found["weights"],
            "apply_seconds": self._applied,
            "passes": [] if plan is None else [asdict(step) for step in plan.steps],
            "promise": None if plan is None else _weakest(plan),
            "notes": [] if plan is None else [*_left_out(plan), *filter(None, [self._note])],
        }

    def speak(self) -> dict[str, Any]:
        """One request, as ``Run.to_dict``."""
        self._last = run(self._model, self._job.seed, self._job.request)
        return self._last.to_dict()

    def reference(self) -> bytes:
        """What upstream says, for others to be compared with: a pickled ``Reference``.

        Tensors that go through a pipe as such are shared memory, which belongs to the process that made it.
        """
        return pickle.dumps(reference_of(self._model, self._job.request, self._job.seed))

    def quality(self, reference: bytes) -> dict[str, Any]:
        """The last request against the reference."""
        assert self._last is not None, "speak first"
        said = pickle.loads(reference)
        return asdict(quality_of(self._model, self._job.request, self._job.seed, self._last.sample, said))


def _weakest(plan: Plan) -> str:
    return max((plan.step(name).fidelity for name in plan.running), key=FIDELITIES.index, default="exact")


def _left_out(plan: Plan) -> list[str]:
    """What the configuration asks for by name, and does not get."""
    asked = [name for name, section in plan.config.sections() if type(section)().idle and not section.idle]
    steps = [plan.step(name) for name in asked]
    return [f"{step.name} left out: {step.reason}" for step in steps if step.status == "skipped"]


def serve(pipe: Connection, job: Job) -> None:
    """Answer (name, arguments) with what that method of ``Worker`` returns, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides what an interrupt means
    if not job.debug:
        _silence()
    try:
        worker = Worker(job)
        pipe.send(worker.facts())
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(worker, name)(*arguments))
    except EOFError:
        return
    except BaseException as error:
        if job.debug:
            traceback.print_exc()
        with suppress(OSError):
            pipe.send(Failure(describe(error), is_out_of_memory(error)))


def _silence() -> None:
    """Nothing of what libraries print, C libraries included, reaches the terminal."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
