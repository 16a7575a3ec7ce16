"""Seconds that a reference voice takes to encode, upstream and optimized, each state in processes of its own.

Run: python benchmarks/conditioning.py [--model english] [--rounds 3] [--size full]; with --products or --resampling it
measures what those options of the pass choose between. Synthetic models whose encoders are full-size (T3, which takes
no part, is small, so that processes start fast); recordings of eleven seconds.

States: "installed" (no compiled functions of librosa on disk yet: where a container starts every time), "process" (they
are there; first call of a process), "warm" (another recording, encoded before by nobody), "cached" (the same again).
Sides take turns. --lock FILE is locked for one turn of each, for machines that several share.
"""

import argparse
import fcntl
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

SIDES = {"upstream": None, "exact": {"fidelity": "exact"}, "auto": {}}
WARM = 4


@contextmanager
def alone(lock):
    """Hold the lock file, if there is one."""
    with open(lock or os.devnull) as file:
        if lock:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def recordings(folder):
    """Paths of recordings that differ in level only."""
    import soundfile

    from chatterbox_turbo import synthetic

    samples, rate = soundfile.read(synthetic.reference_voice(), dtype="float32")
    paths = [Path(folder) / f"{number}.wav" for number in range(WARM + 1)]
    for number, path in enumerate(paths):
        soundfile.write(path, samples * (1 - number / 100), rate, subtype="FLOAT")
    return [str(path) for path in paths]


def build(family, size):
    """A model that has encoded no voice yet."""
    from chatterbox_turbo import synthetic
    from chatterbox_turbo.synthetic import checkpoint
    from chatterbox_turbo.synthetic.architecture import _shrink_t3

    checkpoint._encode_reference_voice = lambda model, size: None  # it would pay for the first call
    with ExitStack() as patches:
        if family != "vc":
            _shrink_t3(patches)
        return synthetic.build(family, size, stop_after=20)


def one_process(side, family, size):
    """Print the times of one process, the bytes kept alive by a graph, and a digest of the voice, as JSON."""
    import torch

    import chatterbox_turbo as turbo

    warnings.simplefilter("ignore")
    model = build(family, size)
    off = {name: {"enabled": False} for name, _ in turbo.OptimizationConfig().sections() if name != "conditioning"}
    encode = "set_target_voice" if family == "vc" else "prepare_conditionals"
    found = {}

    def timed(path):
        start = time.perf_counter()
        getattr(model, encode)(path)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        first, *others = recordings(folder)
        start = time.perf_counter()
        if SIDES[side] is not None:
            turbo.apply(model, {**off, **SIDES[side]})
        found["apply"] = time.perf_counter() - start
        found["first"] = timed(first)
        found["warm"] = [timed(path) for path in others]
        found["cached"] = [timed(first) for _ in range(WARM)]
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {t.untyped_storage().data_ptr() for t in model.s3gen.parameters()}
        Path(first).write_bytes(Path(first).read_bytes() + b"\0")  # another content for the cache, the same audio
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            timed(first)
        found["graph"] = sum(size for place, size in kept.items() if place not in weights)
    voice = model.ref_dict if family == "vc" else {**vars(model.conds.t3), **model.conds.gen}
    content = b"".join(v.detach().numpy().tobytes() for v in voice.values() if torch.is_tensor(v))
    found["voice"] = hashlib.sha256(content).hexdigest()[:8]
    print("RESULT " + json.dumps(found))


def run(side, family, size, compiled):
    """What one process finds, with its compiled functions in a folder."""
    command = [sys.executable, __file__, "--model", family, "--size", size, "--side", side]
    done = subprocess.run(command, env={**os.environ, "NUMBA_CACHE_DIR": compiled}, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(done.stderr)


def compare(family, size, rounds, lock):
    """Print a table of medians, and ratios over rounds."""
    results = {side: {"installed": [], "process": []} for side in SIDES}
    with tempfile.TemporaryDirectory() as compiled:
        run("upstream", family, size, compiled)  # which compiles
        for number in range(rounds):
            for state in ("installed", "process"):
                with alone(lock):
                    for side in list(SIDES) if number % 2 else list(SIDES)[::-1]:
                        with tempfile.TemporaryDirectory() as empty:
                            folder = empty if state == "installed" else compiled
                            results[side][state].append(run(side, family, size, folder))
    print(f"{family}, {size}: seconds, median (min to max); ratio of upstream to optimized, median over rounds")
    for name, take in {
        "installed": lambda r: [p["first"] for p in r["installed"]],
        "process": lambda r: [p["first"] for p in r["process"]],
        "warm": lambda r: [statistics.median(p["warm"]) for p in r["installed"] + r["process"]],
        "cached": lambda r: [statistics.median(p["cached"]) for p in r["installed"] + r["process"]],
        "apply": lambda r: [p["apply"] for p in r["process"]],
    }.items():
        values = {side: take(results[side]) for side in SIDES}
        row = [f"{statistics.median(v):.4f} ({min(v):.4f} to {max(v):.4f})" for v in values.values()]
        pairs = {s: [a / b for a, b in zip(values["upstream"], values[s], strict=True)] for s in SIDES}
        ratios = " ".join(f"{statistics.median(pairs[side]):.2f}x" for side in list(SIDES)[1:])
        print(f"  {name:<10}" + "".join(f"{text:<30}" for text in row) + ratios)
    for key in ("graph", "voice"):
        print(f"  {key:<10}" + "".join(f"{results[side]['process'][0][key]!s:<30}" for side in SIDES))


def products(lock):
    """Print GFLOP/s of the speech tokenizer's products, by PyTorch's choice and by oneDNN."""
    import torch
    import torch.nn.functional as F

    from chatterbox_turbo.runtime.cpu.onednn import onednn

    with torch.inference_mode(), alone(lock):
        for outputs, inputs in ((5120, 1280), (1280, 5120), (1280, 1280)):
            weights = [torch.randn(outputs, inputs) for _ in range(4)]  # more than the caches hold
            for rows in (25, 150, 250, 375):
                x, speeds = torch.randn(1, rows, inputs), []
                for linear in (F.linear, onednn()):
                    linear(x, weights[0], None)
                    best = 0.0
                    for _ in range(8):
                        start = time.perf_counter()
                        for weight in weights:
                            linear(x, weight, None)
                        best = max(best, len(weights) * 2e-9 * x.numel() * outputs / (time.perf_counter() - start))
                    speeds.append(best)
                print(f"{rows:>4} rows, {inputs} to {outputs}: torch {speeds[0]:.0f}, oneDNN {speeds[1]:.0f} GFLOP/s")


def resampling(size, lock):
    """Print milliseconds of both resamplers for eleven seconds, and what the other filter does to a voice."""
    import numpy as np
    import soundfile
    import torch

    from chatterbox_turbo import synthetic
    from chatterbox_turbo.runtime.voice.reference_audio import resample, resample_on

    samples, rate = soundfile.read(synthetic.reference_voice(), dtype="float32")
    tokenizer, other = build("english", size).s3gen.tokenizer, resample_on("cpu")
    with alone(lock):
        for source, target in ((rate, 16000), (44100, 24000), (48000, 24000), (8000, 24000)):
            signal, spent = resample(samples, rate, source), []
            for function in (resample, other):
                times = []
                for _ in range(7):
                    start = time.perf_counter()
                    result = function(signal, source, target)
                    times.append(1000 * (time.perf_counter() - start))
                spent.append((statistics.median(times), result))
            (ours, a), (theirs, b) = spent
            n = min(len(a), len(b))
            snr = 10 * np.log10(np.square(a[:n]).sum() / np.square(a[:n] - b[:n]).sum())
            line = f"{source} to {target}: soxr {ours:.1f} ms, torchaudio {theirs:.1f} ms, SNR {snr:.0f} dB"
            if target == 16000:
                ids = [tokenizer.forward([torch.from_numpy(x[:96000])], max_len=150)[0] for x in (a, b)]
                line += f", {int((ids[0] == ids[1]).sum())} of {ids[0].numel()} prompt tokens equal"
            print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="english")
    parser.add_argument("--size", default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock")
    parser.add_argument("--side", choices=SIDES, help="measure one process, for internal use")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--resampling", action="store_true")
    given = parser.parse_args()
    if given.side:
        one_process(given.side, given.model, given.size)
    elif given.products:
        products(given.lock)
    elif given.resampling:
        resampling(given.size, given.lock)
    else:
        compare(given.model, given.size, given.rounds, given.lock)
