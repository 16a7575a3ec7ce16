"""What the tests of the command share: running it, and reading what it wrote."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from chatterbox_turbo.cli import main

ROOT = Path(__file__).parent.parent
METRICS = {"t3", "t3_step", "flow", "vocoder", "watermark", "end_to_end", "real_time_factor", "peak_memory"}


def command(
    folder: Path, *arguments: str, stdin: str | None = None, encoding: str = "utf-8", **environment: str
) -> subprocess.CompletedProcess:
    """Run the command in its own process, with ``folder`` as the working directory; ``encoding``: of its streams."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "chatterbox_turbo.cli", *arguments],
        cwd=folder,
        input=stdin,
        capture_output=True,
        encoding=encoding,
        # one thread: on a busy machine the threads of a tiny model mostly wait for each other
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding, **environment},
        timeout=300,
    )


def started(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """The command in its own process and session, which goes on beside the test and can be sent signals."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "chatterbox_turbo.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a suite that a shell runs in the background ignores interrupts, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def watermark_in(path: Path) -> float:
    """Duration in seconds of an audio file that carries PerTh's mark, by PerTh's own detector."""
    import perth
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32")
    assert perth.PerthImplicitWatermarker().get_watermark(samples, sample_rate=rate).mean() == 1.0
    return len(samples) / rate


def error(capsys, *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return code, lines[0]
