"""What the file of `chatterbox-turbo enable` costs a Python that starts: processor time, with and without it.

    python benchmarks/launcher_start.py [rounds]

In a virtual environment that is made for it, of the interpreter that runs this. Rows are interleaved; the milliseconds
are user and system time of a process that does nothing, median and quartiles, so that a busy machine tells the same.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from chatterbox_turbo.launch.site_file import CONTENT, NAME

ROOT = Path(__file__).parents[1]
ROWS = {
    "without the file": (False, {}),
    "with it": (True, {}),
    "CHATTERBOX_TURBO set": (True, {"CHATTERBOX_TURBO": "auto"}),
}


def milliseconds(python: Path, variables: dict[str, str]) -> float:
    """Processor time of one start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, "-c", "pass"], env=variables, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def main(rounds: int = 100) -> None:
    """Measure and print the table."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "CHATTERBOX"))}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = Path(folder) / "bin" / "python"
        (packages,) = Path(folder).glob("lib/*/site-packages")
        paths = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
        (packages / "a.pth").write_text("\n".join(paths))
        found: dict[str, list[float]] = {name: [] for name in ROWS}
        for number in range(rounds + 1):
            for name, (there, variables) in ROWS.items():
                (packages / NAME).write_text(CONTENT) if there else (packages / NAME).unlink(missing_ok=True)
                taken = milliseconds(python, {**kept, **variables})
                if number:  # the first compiles
                    found[name].append(taken)
    base = statistics.median(found["without the file"])
    for name, values in found.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:<22} {middle:6.2f} ms ({low:.2f} to {high:.2f}), {middle - base:+.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
