"""Long work: how far it is, how long it will take, and an end that can be asked for."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from .screen import Screen

EVERY = 10.0  # seconds from one line to the next where there is no terminal


@contextmanager
def progress_bar(screen: Screen, what: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A function to call with how much of ``total`` is done, and a few words; the time left is told.

    The first call says where the work begins. A bar, or a line now and then where stderr is no terminal.
    """
    left = _Left(total)
    if not screen.err.is_terminal:
        yield _lines(screen, what, total, left)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=screen.err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, words: bar.update(task, completed=done, description=f"{what}: {words}{left(done)}")


class _Left:
    """``, 2:03 left`` by the pace since the first call, which is none where an earlier run has done a part."""

    def __init__(self, total: float):
        self._total = total
        self._began: tuple[float, float] | None = None

    def __call__(self, done: float) -> str:
        now = time.monotonic()
        began, first = self._began = self._began or (now, done)
        if done <= first or done >= self._total:
            return ""
        return f", {duration((self._total - done) * (now - began) / (done - first))} left"


def _lines(screen: Screen, what: str, total: float, left: _Left) -> Callable[[float, str], None]:
    told: float | None = None

    def line(done: float, words: str) -> None:
        nonlocal told
        time_left, now = left(done), time.monotonic()
        if told is None or now - told >= EVERY or done >= total:
            told = now
            screen.note(f"{what}: {words}{time_left}")

    return line


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """In the body SIGTERM does what Ctrl-C does; nothing where signals are another thread's."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
