"""A memory budget on a CPU: what was estimated, and what a process has measured, by phase.

Run: python benchmarks/budget.py [english|multilingual|turbo|vc] [tokens] [budget] [preset] [full|tiny] [slots]. A
synthetic model speaks in this process, ``tokens`` speech tokens, up to 1000, with one step of flow matching, which
takes the memory of all others; with ``slots`` above 1 a batch of so many utterances. ``auto+bfloat16``: in half
precision, where the processor is good at it, with the originals let go of.
"""

import sys
import warnings

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import arguments
from chatterbox_turbo.runtime.cpu.host_memory import give_back
from chatterbox_turbo.upstream.families import identify


def main():
    """Print the report."""
    given = dict(enumerate(sys.argv))
    family, tokens, budget = given.get(1, "english"), int(given.get(2, 200)), given.get(3, "100%")
    warnings.simplefilter("ignore")
    slots = int(given.get(6, 1))
    stop = None if family == "vc" else min(tokens, 990)  # the most that a synthetic model can be made to speak
    model = synthetic.build(family, given.get(5, "full"), stop_after=stop)
    give_back()
    decoding = {"progress": "off", "max_new_tokens": min(tokens + 1, 1000)}
    preset, _, half = given.get(4, "auto").partition("+")
    values = {"preset": preset, "fidelity": "lossy", "memory_budget": budget, "memory": {"peaks": True}}
    values["budget_slots"] = slots
    if half:
        values["precision"] = {"enabled": True, "t3": half, "flow": half, "originals": "discard"}
    turbo.apply(model, {**values, "decoding": decoding, "flow": {"steps": 1}, "conditioning": {"cache_bytes": 2**22}})
    text = "The quick brown fox jumps over the lazy dog, and nobody minds at all."
    request = arguments(identify(model), text, audio=str(synthetic.reference_voice()))
    torch.manual_seed(0)
    if slots > 1:
        model.turbo.batch([request] * slots, slots=slots)
    else:
        model.generate(**request)
    made, taken = model.turbo.plan.fit.estimate, model.turbo.report().taken
    print(model.turbo.report())
    most, now = max(taken.values()), model.turbo.memory()["weights"]
    print(f"estimated {made.needed / 2**20:.0f} MiB, measured {most / 2**20:.0f} MiB: {made.needed / most:.2f}")
    print(f"weights estimated {made.weights}, now {now}")


if __name__ == "__main__":
    main()
