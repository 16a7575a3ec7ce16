"""Seconds and peak memory of loading a full-size checkpoint: upstream's ``from_local``, ``load``, and ``load`` with
``mapped=True`` in turn.

Run: python benchmarks/loading.py [english|multilingual|turbo|vc] [rounds] [folder]. Without a folder a synthetic
checkpoint of up to 3.2 GB is written to the temporary directory first. Each load has a process of its own, whose
imports are not timed; the files are in the system's cache (one load before the first round sees to it). What mapping
puts off shows in the first reading of all weights, timed after each load.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import chatterbox_turbo as turbo
from chatterbox_turbo.upstream.loading import model_class
side, family, folder = sys.argv[1:]
cls, load = model_class(family), turbo.load
if family == "multilingual":  # its tokenizer asks the network for a word segmenter
    architecture = turbo.synthetic.architecture("full")
    architecture.__enter__()
unit = 2**20 if sys.platform == "darwin" else 2**10
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
before, start = peak(), time.perf_counter()
if side == "upstream":
    model = cls.from_local(folder, "cpu")
else:
    model = load(cls, "cpu", folder=folder, optimize=False, mapped=side == "mapped")
seconds = time.perf_counter() - start
parts = [getattr(model, name) for name in ("t3", "s3gen", "ve") if hasattr(model, name)]
weights = [t for part in parts for t in part.state_dict().values()]
start = time.perf_counter()
for tensor in weights:
    tensor.sum()
result = {"seconds": seconds, "first_use": time.perf_counter() - start, "before": before, "peak": peak()}
print("\\n" + json.dumps({**result, "weights": sum(t.nbytes for t in weights) / 2**20}))
"""


def load(side, family, folder):
    """What one load in a process of its own measured: seconds, and MiB before it, at its peak and of the weights."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, side, family, folder], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def shown(values, unit):
    """Median and range."""
    return f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"


def main():
    """Print a table of both."""
    family = sys.argv[1] if len(sys.argv) > 1 else "english"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as temporary:
        folder = sys.argv[3] if len(sys.argv) > 3 else temporary
        if not any(Path(folder).glob("s3gen*")):
            code = f"from chatterbox_turbo import synthetic; synthetic.save({folder!r}, {family!r}, 'full')"
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True)
        load("mapped", family, folder)
        runs = {"upstream": [], "load": [], "mapped": []}
        for number in range(rounds):
            for side in list(runs)[:: -1 if number % 2 else 1]:
                runs[side].append(load(side, family, folder))
    weights = runs["load"][0]["weights"]
    print(f"{family}: {weights:.0f} MiB of weights, {rounds} rounds in alternating order, median (range)")
    for side, results in runs.items():
        grown = [(r["peak"] - r["before"]) / r["weights"] for r in results]
        peaks = [r["peak"] / 1024 for r in results]
        print(
            f"{side:<9} {shown([r['seconds'] for r in results], 's'):<26} peak of the process {shown(peaks, 'GiB')}, "
            f"growth over the weights {statistics.median(grown):.2f}, "
            f"first reading {shown([r['first_use'] for r in results], 's')}"
        )
    for side in ("load", "mapped"):
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["upstream"], runs[side], strict=True)]
        print(f"upstream / {side}: {shown(ratios, 'x')}")


if __name__ == "__main__":
    main()
