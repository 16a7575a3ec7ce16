"""Memory of long speech: the peak of a process that says so many seconds from one text, by each way to say it.

python benchmarks/long_speech.py [FAMILY] [SECONDS ...]; by default turbo, 20 and 1800

A tiny model with random weights that ends each piece after 20 seconds. Each line is a process of its own; what its
peak is above that of the first length of the same way stands beside it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

WAYS = ("generate", "stream", "read")
PIECE = 500  # tokens
SENTENCE = "Nobody had asked the captain whether the tide would come back before noon. "  # about four seconds


def spoken(family: str, way: str, seconds: float) -> None:
    """Say it, and print seconds of speech, seconds that it took, MiB at the peak."""
    import chatterbox_turbo as turbo
    from chatterbox_turbo import synthetic
    from chatterbox_turbo.measure.fidelity import arguments
    from chatterbox_turbo.runtime.cpu import process_memory
    from chatterbox_turbo.upstream.families import identify

    model = synthetic.build(family, "tiny", stop_after=PIECE)
    text = {"target": 20.0, "retries": 0}
    turbo.apply(model, {"decoding": {"progress": "off"}, "text": text})
    request = arguments(identify(model), SENTENCE * round(seconds / 4))
    start = time.perf_counter()
    if way == "generate":
        samples = model.generate(**request).size(1)
    elif way == "stream":
        samples = sum(block.size(1) for block, _ in model.turbo.stream(**request, seed=0))
    else:
        with tempfile.TemporaryDirectory() as folder:
            book = Path(folder) / "book.txt"
            book.write_text(request.pop("text"))
            samples = model.turbo.read(book, Path(folder) / "book.flac", **request).seconds * model.sr
    elapsed = time.perf_counter() - start
    print(samples / model.sr, elapsed, process_memory.resident().peak / 2**20)


def main(family: str = "turbo", *lengths: str) -> None:
    """Print a line for each way and length."""
    for way in WAYS:
        least = None
        for length in lengths or ("20", "1800"):
            command = [sys.executable, __file__, "--one", family, way, length]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            speech, elapsed, peak = map(float, line.split())
            least = least or peak
            print(
                f"{way}: {speech:.0f} s of speech in {elapsed:.0f} s, peak {peak:.0f} MiB, {peak / least:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--one"]:
        spoken(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main(*sys.argv[1:])
