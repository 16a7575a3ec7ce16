"""What the user sees: results on stdout, progress and errors on stderr, upstream's chatter on neither."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from ..errors import (
    NumbersKeptWarning,
    RunawayWarning,
    SlowLoadingWarning,
    SpeechTruncatedWarning,
    WatermarkWarning,
)

PROGRAM = "chatterbox-turbo"
WIDTH = 160  # of output that goes to a file or a pipe

# what users are told, where upstream's warnings are not shown
OURS = (NumbersKeptWarning, RunawayWarning, SlowLoadingWarning, SpeechTruncatedWarning, WatermarkWarning)


class Screen:
    """The two consoles of one command, and its global options."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments
        self.debug = False
        # with the streams of now: while upstream is silenced, sys.stdout and sys.stderr are others
        self.out, self.err = (
            Console(file=_any(stream), width=None if stream.isatty() else WIDTH, markup=False, highlight=False)
            for stream in (sys.stdout, sys.stderr)
        )
        self._status: Status | None = None

    def print(self, line: Any = "") -> None:
        """A line or table of the result."""
        self.out.print(line, soft_wrap=not isinstance(line, Table))

    def error(self, message: str) -> None:
        """One line on stderr, whatever the message looks like."""
        lines = [part.strip() for part in message.splitlines() if part.strip()]
        self.err.print(f"error: {'; '.join(lines)}", soft_wrap=True)

    def note(self, message: Any) -> None:
        """A line or table on stderr."""
        self.err.print(message, soft_wrap=not isinstance(message, Table))

    @contextmanager
    def step(self, message: str) -> Iterator[None]:
        """Show that something long is going on: a spinner, or a line where stderr is no terminal."""
        if not self.err.is_terminal:
            self.note(f"{message} …")
            yield
            return
        with self.err.status(f"{message} …") as self._status:
            try:
                yield
            finally:
                self._status = None

    def announce(self, message: str) -> None:
        """Another message for the step that is under way."""
        if self._status is not None:
            self._status.update(f"{message} …")
        else:
            self.note(f"{message} …")

    @contextmanager
    def quiet(self, bars: bool = False) -> Iterator[None]:
        """Keep upstream's prints, bars, warnings and logs off the screen, our own warnings excepted.

        Nothing is kept back with ``--debug``. ``bars``: leave stderr alone, for the progress of a download.
        """
        if self.debug:
            yield
            return
        disabled = logging.root.manager.disable
        with ExitStack() as stack:
            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("ignore")
            for category in OURS:
                warnings.simplefilter("always", category)
            stack.enter_context(redirect_stdout(_Nowhere()))
            if not bars:
                stack.enter_context(redirect_stderr(_Nowhere()))
            logging.disable(logging.CRITICAL)
            try:
                yield
            finally:
                logging.disable(disabled)
                for message in dict.fromkeys(str(warning.message) for warning in caught):
                    self.note(f"warning: {message}")

    def write_json(self, data: Mapping[str, Any], path: str) -> None:
        """Write to a file, or to stdout where the path is ``-``; infinite figures become strings."""
        data = _finite(data)
        text = json.dumps(data, indent=2, ensure_ascii=False)
        try:
            text.encode(self.out.encoding if path == "-" else "utf-8")
        except UnicodeEncodeError:  # names of files need not be text
            text = json.dumps(data, indent=2)
        if path == "-":
            self.out.file.write(text + "\n")
        else:
            Path(path).write_text(text + "\n", encoding="utf-8")


def _any(stream: Any) -> Any:
    """A stream that writes what its encoding lacks (on Windows often cp1252) as ``\\u017c``, as stderr always does."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


class _Nowhere(io.TextIOBase):
    """A stream that forgets, and that stays usable for a log handler that was made while it was in place."""

    def write(self, text: str) -> int:
        return len(text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def table(title: str, *columns: str) -> Table:
    """An empty table whose first column is text and whose others are aligned to the right."""
    result = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left")
    return result
