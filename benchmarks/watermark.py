"""PerTh's watermark by upstream, by the pass where PerTh is, and by the pass on the model's device.

Run: python benchmarks/watermark.py [device] [rounds]. Eight seconds of audio each, sides in turns.
"""

import statistics
import sys
import time
import warnings

import numpy as np
import soundfile
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db

SECONDS = 8


def signals(model):
    """Samples (n,) float32 by name, at the model's rate."""
    n = SECONDS * model.sr
    speech = soundfile.read(synthetic.reference_voice(), dtype="float32")[0][:n]
    torch.manual_seed(0)
    said = []
    original = model.watermarker.apply_watermark
    model.watermarker.apply_watermark = lambda signal, **rest: said.append(signal) or original(signal, **rest)
    model.generate("The quick brown fox jumps over the lazy dog.")
    del model.watermarker.apply_watermark
    gaps = np.where(np.arange(len(speech)) % (model.sr // 5) < model.sr // 10, speech, np.float32(0))
    noise = (0.1 * np.random.default_rng(0).standard_normal(n)).astype(np.float32)
    short = speech[model.sr : model.sr + model.sr // 10]
    return {
        "recorded speech": speech,
        "a moment of it": short,
        "synthetic model's": said[0][:n],
        "white noise": noise,
        "gaps of zeros": gaps,
    }


def main(device="cpu", rounds="15"):
    """Print a table of closeness and one of times."""
    warnings.simplefilter("ignore")
    model = synthetic.build("turbo", "tiny", stop_after=25 * SECONDS, device=device)
    real, samples = model.watermarker, signals(model)
    off = {name: {"enabled": False} for name, _ in turbo.OptimizationConfig().sections()}

    def upstream(signal):
        return real.apply_watermark(signal, sample_rate=model.sr)

    def by(where):
        def mark(signal):
            return model.watermarker.apply_watermark(signal, sample_rate=model.sr)

        return mark, {**off, "watermark": {"device": where}}

    def confidence(marked):
        return float(real.get_watermark(marked, sample_rate=model.sr, round=False).mean())

    for where in ("perth", "model"):
        mark, config = by(where)
        with turbo.optimized(model, config):
            for name, signal in samples.items():
                reference, ours = upstream(signal), mark(signal)
                snr = snr_db(torch.from_numpy(ours), torch.from_numpy(reference))
                found = f"{confidence(reference):.6f}, {confidence(ours):.6f}"
                print(f"| {where} | {name}, {len(signal) / model.sr:.1f} s | {snr:.1f} dB | {found} |", flush=True)

    signal, times = samples["recorded speech"], {}
    for _ in range(int(rounds) + 1):
        for name in ("upstream", "perth", "model"):
            mark, config = (upstream, None) if name == "upstream" else by(name)
            with turbo.optimized(model, config or off):
                start = time.perf_counter()
                mark(signal)
                times.setdefault(name, []).append(1000 * (time.perf_counter() - start))
    for name, taken in times.items():
        taken = taken[1:]  # the first pays for what is loaded once
        ratio = statistics.median(a / b for a, b in zip(times["upstream"][1:], taken, strict=True))
        print(f"| {name} | {statistics.median(taken):.1f} ms ({min(taken):.1f} to {max(taken):.1f}) | {ratio:.2f}x |")


if __name__ == "__main__":
    main(*sys.argv[1:])
