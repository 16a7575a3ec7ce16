"""``model.turbo.batch`` on a full-size model: T3 alone by the size of the batch, then whole batches against one by one.

python benchmarks/batches.py [FAMILY] [PRESET] [TOKENS] [UTTERANCES]
"""

from __future__ import annotations

import sys
import time
import warnings

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import arguments, snr_db
from chatterbox_turbo.upstream.families import identify

TEXTS = ("One.", "The tide went out before noon.", "Is it two, or is it three?", "Nobody had asked the captain.")


def main(family: str = "english", preset: str = "auto", tokens: str = "50", utterances: str = "8") -> None:
    warnings.simplefilter("ignore")
    model = synthetic.build(family, "full", stop_after=int(tokens))
    items = [{**arguments(identify(model), TEXTS[n % 4]), "seed": n} for n in range(int(utterances))]
    config = {"preset": preset, "decoding": {"progress": "off"}}
    turbo.apply(model, config)
    decode(model, items)
    speak(model, items, config)


def decode(model, items) -> None:
    """Tokens a second of T3, prefill included, by the number of requests."""
    engine, requests = model.turbo.token_model, []

    class Done(BaseException):
        pass

    def keep(*args, **kwargs):
        requests.append(engine.request(*args, **kwargs))
        raise Done

    for item in items:
        try:
            with engine.calls.diverted(keep), torch.inference_mode():
                model.generate(**{key: value for key, value in item.items() if key != "seed"})
        except Done:
            pass
    for round_ in range(3):
        line = []
        for count in sorted({1, 2, 4, len(items)}):
            torch.manual_seed(0)
            start = time.perf_counter()
            ids = engine.run(requests[:count])
            line.append(f"{count}: {sum(row.numel() for row in ids) / (time.perf_counter() - start):.1f}")
        if round_:  # the first one is a warm-up
            print("tokens a second by requests at once:", ", ".join(line), flush=True)


def speak(model, items, config) -> None:
    """Seconds of all utterances: by ``generate``, and by ``batch`` with audio one by one and together."""

    def alone():
        waves = []
        for item in items:
            torch.manual_seed(item["seed"])
            waves.append(model.generate(**{key: value for key, value in item.items() if key != "seed"}))
        return waves

    expected = None
    for name, frames in (("generate", None), ("audio one by one", 1), ("2000 frames", 2000), ("8000 frames", 8000)):
        turbo.apply(model, {**config, "flow": {"batch_frames": frames}})
        start = time.perf_counter()
        waves = alone() if name == "generate" else model.turbo.batch(items)
        seconds = time.perf_counter() - start
        expected = expected or waves
        audio = sum(wave.size(-1) for wave in waves) / model.sr
        worst = min(snr_db(a, b) if a.shape == b.shape else -1.0 for a, b in zip(waves, expected, strict=True))
        print(
            f"{name}: {seconds:.1f} s, {audio / seconds:.3f} s of audio a second, worst SNR {worst:.0f} dB", flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
