"""Milliseconds to switch to a named voice: ``use``, and what ``voice=`` adds to a call, with voices of ten seconds."""

from __future__ import annotations

import statistics
import sys
import time

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic

COUNT = 1000


def main(families: list[str]) -> None:
    """Median and 95th percentile over 1,000 switches between two voices."""
    for family in families or ["english", "multilingual", "turbo", "vc"]:
        model = turbo.apply(synthetic.build(family, "tiny"), {"decoding": {"progress": "off"}})
        voices = model.turbo.voices
        voices.add("a", str(synthetic.reference_voice()))
        voices.add("b", voices.conditionals("a"))
        for name, switch in (("use", voices.use), ("voice=", voices.choose)):
            taken = []
            for number in range(COUNT):
                start = time.perf_counter()
                switch("ab"[number % 2])
                taken.append(1e3 * (time.perf_counter() - start))
            median, high = statistics.median(taken), statistics.quantiles(taken, n=20)[-1]
            print(f"{family:<13} {name:<7} {median:6.3f} ms, 95 % below {high:6.3f} ms, {COUNT} switches")


if __name__ == "__main__":
    main(sys.argv[1:])
