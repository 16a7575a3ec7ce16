"""A process that forks while another thread is at a given place of a call; prints what became of each child, as JSON.

Run by ``test_fork_amid_calls.py``. The other thread is halted by a profile function of its own, in the
midst of the code that runs otherwise.
"""

import json
import sys
import threading
import warnings
from pathlib import Path

import torch
from forked import LIMIT, TEXT, forked

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db

PACKAGE = str(Path(turbo.__file__).parent)
OPTIONS = {
    "decoding": {"kernel": "numba", "progress": "off"},
    "memory": {"clear": "between"},
    "offload": {"mode": "idle"},
}


def speak(model, **options):
    torch.manual_seed(3)
    return model.generate(TEXT, **options)


def alike(samples, expected):
    return samples.shape == expected.shape and snr_db(samples, expected) > 60


class Halted:
    """``work`` in another thread, which stops in the body where a function of the package begins.

    Args:
        name: of the function, with its class; or a number: that many calls of functions of the package before.
    """

    def __init__(self, work, name):
        self._name, self._left, self._calls = name, threading.Event(), 0
        self.reached = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,))

    def _run(self, work):
        sys.setprofile(self._look)
        try:
            work()
        finally:
            sys.setprofile(None)

    def _look(self, frame, event, _):
        if event != "call" or self.reached.is_set() or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        self._calls += 1
        if self._name in (frame.f_code.co_qualname, self._calls):
            self.reached.set()
            self._left.wait(LIMIT)

    def __enter__(self):
        self._thread.start()
        while not self.reached.wait(0.01) and self._thread.is_alive():
            pass
        return self

    def __exit__(self, *_):
        self._left.set()
        self._thread.join()


def main(places):
    """A child for each of the places (a list of [kind of call, place])."""
    warnings.simplefilter("ignore")
    model = synthetic.build("turbo", "tiny", stop_after=12)
    turbo.apply(model, OPTIONS)
    own = model.conds
    model.turbo.voices.add("other", own)
    other = model.turbo.voices.conditionals("other")
    other.t3.speaker_emb = -other.t3.speaker_emb
    other.gen["embedding"] = -other.gen["embedding"]
    model.turbo.voices.add("other", other, replace=True)
    expected, with_other = speak(model), speak(model, voice="other")

    def stream():
        with model.turbo.stream(TEXT, seed=4, voice="other") as blocks:
            for _ in blocks:
                pass

    calls = {
        "generate": lambda: speak(model, voice="other"),
        "batch": lambda: model.turbo.batch([{"text": TEXT, "voice": "other", "seed": 5}, {"text": "Two.", "seed": 6}]),
        "stream": stream,
    }

    def judged(numbers):
        found = {"voice": model.conds is own, "random numbers": numbers is None or torch.equal(torch.rand(4), numbers)}
        before = model.turbo.memory()["history"][-1]
        cleared = model.turbo.memory()["clearings"].get("between requests", {}).get("count", 0)
        found["samples"] = alike(speak(model), expected)
        found["phases"] = {"t3", "flow", "vocoder"} <= set(model.turbo.timings())
        found["request counted"] = model.turbo.memory()["history"][-1] != before
        found["memory cleared"] = model.turbo.memory()["clearings"]["between requests"]["count"] == cleared + 1
        found["other voice"] = alike(speak(model, voice="other"), with_other)
        found["voice afterwards"] = model.conds is own
        return found

    def reverted():
        turbo.revert(model)
        return {"reverted": alike(speak(model), expected) and model.conds is own and not hasattr(model, "turbo")}

    outcomes = []
    for kind, place in places:
        torch.manual_seed(11)
        numbers = torch.rand(4)
        torch.manual_seed(11)
        with Halted(calls[kind], place) as halted:
            there = halted.reached.is_set()
            # generate draws from the process's own generator, as upstream's does
            first = forked(lambda: judged(numbers if kind != "generate" else None))  # noqa: B023
            outcomes.append([there, first, forked(reverted)])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
