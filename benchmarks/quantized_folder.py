"""Peak memory and seconds of writing and of loading a quantized checkpoint folder of a full-size model on a CPU.

Run: python benchmarks/quantized_folder.py [english|multilingual|turbo] [scheme] [folder]. Without a folder a synthetic
checkpoint of up to 3.2 GB is written to the temporary directory first. Each row has a process of its own: how much its
resident memory grew at the most over what it was after the imports (VmHWM, file pages included), in GB and as a share
of the bytes of the weights that it loaded. Rows are the command's work (``quantize``), ``load`` of the folder it has
written, the same with ``mapped=True``, and what there is without a folder: ``load`` of the original, then ``apply``
with the same quantization and ``originals = "discard"``.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROW = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
import chatterbox_turbo as turbo
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.loading import model_class
row, family, scheme, source, folder = sys.argv[1:]
model_class(family)
turbo.apply, turbo.load
if family == "multilingual":  # its tokenizer asks the network for a word segmenter
    turbo.synthetic.architecture("full").__enter__()

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":")) * 1024

before, start, model = status("VmRSS"), time.perf_counter(), None
if row == "quantize":
    turbo.quantize(family, folder, source, scheme=scheme)
elif row == "original":
    model = turbo.load(family, "cpu", folder=source, optimize=False)
    off = {name: {"enabled": False} for name in turbo.OptimizationConfig.model_fields
           if name not in ("preset", "fidelity", "quantization", "memory")}
    section = {"t3": scheme, "originals": "discard", "backend": "torch"}
    turbo.apply(model, {"fidelity": "lossy", "quantization": section})
else:
    model = turbo.load(family, "cpu", folder=folder, optimize=False, mapped=row == "mapped")
seconds, peak, now = time.perf_counter() - start, status("VmHWM") - before, status("VmRSS") - before
parts = identify(model).modules().values() if model is not None else ()
tensors = {id(t): t.nbytes for part in parts for t in (*part.parameters(), *part.buffers())}
print("\\n" + json.dumps(
    {"seconds": seconds, "peak": peak, "now": now, "weights": sum(tensors.values()), "before": before}
))
"""


def measure(*arguments):
    """What one process measured: seconds, and bytes."""
    done = subprocess.run([sys.executable, "-c", ROW, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def size(folder):
    """Bytes of its files."""
    return sum(path.stat().st_size for path in Path(folder).iterdir())


def main():
    """Print a table."""
    family, scheme, source = (*sys.argv[1:], *("english", "int8", "-")[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as temporary:
        if source == "-":
            source = str(Path(temporary) / "original")
            code = f"from chatterbox_turbo import synthetic; synthetic.save({source!r}, {family!r}, 'full')"
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True)
        folder = str(Path(temporary) / "quantized")
        for row in ("quantize", "load", "mapped", "original"):
            result = measure(row, family, scheme, source, folder)
            if row == "quantize":
                print(
                    f"{family}, {scheme}: {size(source) / 1e9:.2f} GB of files as {size(folder) / 1e9:.2f} GB",
                    flush=True,
                )
            weights, share = result["weights"], ""
            if weights:
                share = f", {result['peak'] / weights:.2f} of {weights / 1e9:.2f} GB of weights"
            print(
                f"{row:<9} {result['seconds']:6.1f} s, peak {result['peak'] / 1e9:.2f} GB{share}, at the end "
                f"{result['now'] / 1e9:.2f} GB (imports: {result['before'] / 1e9:.2f} GB)",
                flush=True,
            )


if __name__ == "__main__":
    main()
