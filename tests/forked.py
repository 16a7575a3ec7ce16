"""A process that forks as servers and job queues do, and prints what became of its children, as JSON.

Run by ``test_fork.py``: a test's own process must not fork, nor end by a child that hangs.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings

import numba
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db

TEXT, LIMIT = "One text.", 60  # seconds for a child, which takes one or two
QUIET = {"decoding": {"progress": "off"}}
outcomes: dict[str, object] = {}


def speak(model):
    torch.manual_seed(3)
    return model.generate(TEXT)


def begin(work):
    """A forked child that does ``work``, whose result goes into the pipe that is returned with its id."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        try:
            answer = json.dumps(work())
        except BaseException:
            answer = json.dumps(traceback.format_exc())
        os.write(writing, answer.encode())
    finally:
        os._exit(0)


def outcome(child, reading):
    """What the child answered, or how it ended without an answer."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with os.fdopen(reading) as pipe:
                return json.loads(pipe.read() or json.dumps(f"ended with status {status}"))
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def forked(work):
    return outcome(*begin(work))


def in_thread(work):
    """The result of ``work`` in a new thread of this process."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    thread.join()
    return answers[0]


def main():
    """Every way to fork, over one tiny model."""
    warnings.simplefilter("ignore")
    model = synthetic.build("english", "tiny", stop_after=12)
    upstream = speak(model)

    def right(expected=upstream, least=60.0):
        samples = speak(model)
        return "right" if samples.shape == expected.shape and snr_db(samples, expected) > least else "wrong"

    turbo.apply(model, {"decoding": {"kernel": "numba", "progress": "off"}})
    outcomes["after apply"] = forked(right)
    outcomes["parent"] = right()
    outcomes["layer"] = numba.threading_layer()
    outcomes["after generate"] = forked(right)
    outcomes["of a child"] = forked(lambda: [right(), forked(lambda: [right(), forked(right)])])
    outcomes["from a thread"] = in_thread(lambda: [right(), forked(right)])
    some = [begin(right) for _ in range(3)]
    outcomes["several"] = [outcome(*child) for child in some]
    outcomes["in a thread of the child"] = forked(
        lambda: [torch.get_num_threads(), right(), in_thread(lambda: [torch.get_num_threads(), right()])]
    )
    outcomes["batch"] = forked(
        lambda: "right" if snr_db(model.turbo.batch([{"text": TEXT, "seed": 3}])[0], upstream) > 60 else "wrong"
    )
    outcomes["report"] = [str(model.turbo.report()), forked(lambda: str(model.turbo.report()))]

    with contextlib.suppress(ValueError):  # no such start method
        queue = (context := multiprocessing.get_context("fork")).SimpleQueue()
        process = context.Process(target=lambda: queue.put(right()))
        process.start()
        process.join(LIMIT)
        process.kill()
        outcomes["multiprocessing"] = "hangs" if queue.empty() else queue.get()

    turbo.apply(model, {"preset": "fast", **QUIET})
    half = speak(model)
    # with another number of threads bf16 products add up otherwise: 40 dB, where other tokens would leave none
    outcomes["in half precision"] = forked(lambda: right(half, 30.0))

    def applies_and_reverts():
        turbo.apply(model, QUIET)
        answers = [right()]
        turbo.revert(model)
        return [*answers, right()]

    outcomes["applies and reverts"] = forked(applies_and_reverts)

    # another thread is in the midst of a batch, its calls diverted and its locks held
    halted, finish = threading.Event(), threading.Event()

    def halt(count, limit):
        if threading.current_thread() is other and count == 2:
            halted.set()
            finish.wait(LIMIT)

    turbo.apply(model, {"decoding": {"kernel": "numba", "progress": halt}})
    other = threading.Thread(target=lambda: model.turbo.batch([{"text": TEXT}, {"text": "Two."}]))
    other.start()
    assert halted.wait(LIMIT)
    outcomes["amid a batch of another thread"] = forked(lambda: [right(), turbo.revert(model) is model and right()])
    finish.set()
    other.join()

    # the thread that forks is itself in the midst of a call
    first, children = os.getpid(), []

    def fork(count, limit):
        if count == 2 and not children:
            children.append((os.fork(), reading))

    reading, writing = os.pipe()
    turbo.apply(model, {"decoding": {"kernel": "numba", "progress": fork}})
    answers = [right()]
    if os.getpid() != first:
        os.write(writing, json.dumps([*answers, in_thread(right)]).encode())
        os._exit(0)
    os.close(writing)
    outcomes["amid a call of its own"] = [*answers, outcome(*children[0])]

    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
