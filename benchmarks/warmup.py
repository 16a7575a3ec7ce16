"""Seconds of apply, of the first requests and of the first streams for each level of warm-up.

python benchmarks/warmup.py [FAMILY] [SIZE] [TOKENS] [LEVELS]; full: "english full 25", short: "english tiny 25".
Each level has a process of its own; the first row is of an installation that has nothing on disk yet, and fills it for
the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings

TEXT = "The quick brown fox jumps over the lazy dog."
COLUMNS = ("apply", "request 1", "request 2", "stream 1, first block", "stream 2, first block")


def measure(family: str, size: str, tokens: int, level: str) -> list[float]:
    """Seconds of each column."""
    import torch

    import chatterbox_turbo as turbo
    from chatterbox_turbo import synthetic

    warnings.simplefilter("ignore")
    model = synthetic.build(family, size, stop_after=tokens, device="cuda" if torch.cuda.is_available() else "cpu")
    given = {"text": TEXT, **({"language_id": "en"} if family == "multilingual" else {})}

    def block() -> None:
        with model.turbo.stream(seed=1, **given) as stream:
            next(stream)

    def request() -> None:
        model.generate(**given)

    seconds = []
    config = {"decoding": {"progress": "off"}, "warmup": {"level": level}}
    for function in (lambda: turbo.apply(model, config), request, request, block, block):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def main(family: str = "english", size: str = "tiny", tokens: str = "25", levels: str = "off,light,full") -> None:
    print(f"{family}, {size}, {tokens} tokens; load of the machine before: {os.getloadavg()[0]:.1f}")
    print(f"| level | {' | '.join(COLUMNS)} |")
    first, *_ = levels.split(",")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "CHATTERBOX_TURBO_CACHE": folder}
        for name, level in ((f"{first}, nothing on disk", first), *((level, level) for level in levels.split(","))):
            command = [sys.executable, __file__, family, size, tokens, level, "alone"]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            seconds = json.loads(done.stdout.splitlines()[-1])
            print(f"| {name} | {' | '.join(f'{one:.2f}' for one in seconds)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[5:] == ["alone"]:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])))
    else:
        main(*sys.argv[1:])
