"""How far long work is, as a bar and as lines; SIGTERM."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest
from rich.console import Console

from chatterbox_turbo.cli import progress
from chatterbox_turbo.cli.progress import duration, ended_by_sigterm, progress_bar
from chatterbox_turbo.cli.screen import Screen


def test_a_bar_on_a_terminal(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    screen = Screen([])
    screen.err = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress_bar(screen, "reading", 10.0) as show:
        show(2.0, "2 of 10 pieces")
        clock[0] = 6.0
        show(5.0, "5 of 10 pieces")
    shown = screen.err.file.getvalue()
    assert "reading: 5 of 10 pieces, 0:10 left" in shown and "50%" in shown


def test_lines_elsewhere(capsys, monkeypatch):
    """The first and the last one, and one every ten seconds; what an earlier run has done is no speed of this one."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress_bar(Screen([]), "reading", 100.0) as show:
        for now, done in ((100.0, 50.0), (105.0, 55.0), (120.0, 60.0), (121.0, 99.0), (122.0, 100.0)):
            clock[0] = now
            show(done, f"{done:.0f} of 100")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 50 of 100",
        "reading: 60 of 100, 1:20 left",
        "reading: 100 of 100",
    ]


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 61, 3599.6, 36_000)] == ["0:00", "1:01", "1:00:00", "10:00:00"]


def test_sigterm_is_an_interrupt_in_the_body_alone():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) is before
    done = []

    def elsewhere():
        with ended_by_sigterm():
            done.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [True]
