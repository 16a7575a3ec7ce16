"""One model, several threads: each caller gets the speech of its own text and voice."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import InvalidRequestError, WatermarkWarning
from chatterbox_turbo.runtime.cpu.threads import apart

QUIET = {"decoding": {"progress": "off"}}
TEXTS = ("One text.", "Quite another, longer text.")


@pytest.fixture
def voices(tmp_path):
    """Two recordings of clearly different speakers: the bundled one, and itself a fifth higher."""
    signal, rate = soundfile.read(synthetic.reference_voice())
    higher = np.interp(np.arange(0, len(signal) - 1, 1.5), np.arange(len(signal)), signal)
    paths = [tmp_path / "low.wav", tmp_path / "high.wav"]
    soundfile.write(paths[0], signal[: 6 * rate], rate)
    soundfile.write(paths[1], higher[: 6 * rate], rate)
    return [str(path) for path in paths]


def speakers_by_thread(model, voices, together: bool):
    """The speaker embedding that the flow received in each caller's thread.

    With ``together``, callers wait for one another after their voice has been prepared, for two seconds at
    most: without a lock every voice but the last is then overwritten before it is used.
    """
    seen, barrier = {}, threading.Barrier(len(voices))
    hook = model.s3gen.flow.spk_embed_affine_layer.register_forward_pre_hook(
        lambda module, inputs: seen.__setitem__(threading.get_ident(), inputs[0].clone())
    )
    encode = model.tokenizer.text_to_tokens

    def wait_and_encode(text):
        if together:
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(timeout=2)
        return encode(text)

    model.tokenizer.text_to_tokens = wait_and_encode
    results, errors = {}, []

    def call(number):
        try:
            model.generate(TEXTS[number], audio_prompt_path=voices[number])
            results[number] = seen[threading.get_ident()]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(voices))]
    try:
        for thread in threads:
            thread.start()
            if not together:
                thread.join()
        for thread in threads:
            thread.join()
    finally:
        hook.remove()
        del model.tokenizer.text_to_tokens
    assert errors == []
    return [results[number] for number in range(len(voices))]


def test_callers_keep_their_voices_where_upstream_mixes_them_up(english, voices):
    alone = speakers_by_thread(english, voices, together=False)
    assert not torch.allclose(*alone, atol=1e-3), "the two voices cannot be told apart"
    mixed = speakers_by_thread(english, voices, together=True)
    assert torch.equal(mixed[0], mixed[1]), "upstream no longer races on its voice"
    turbo.apply(english, QUIET)
    ours = speakers_by_thread(english, voices, together=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, ours, strict=True))


def test_seeding_and_generating_can_be_made_one_step(english):
    turbo.apply(english, QUIET)
    expected, results = {}, {}
    for seed in range(4):
        torch.manual_seed(seed)
        expected[seed] = english.generate(TEXTS[seed % 2])

    def call(seed):
        with english.turbo.lock:
            torch.manual_seed(seed)
            results[seed] = english.generate(TEXTS[seed % 2])

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(4))


def test_applying_waits_for_a_running_call(english):
    turbo.apply(english, QUIET)
    running, order = threading.Event(), []

    def generate():
        english.generate(TEXTS[1])
        order.append("generated")

    def progress(count, limit):
        running.set()

    turbo.apply(english, {"decoding": {"progress": progress}})
    thread = threading.Thread(target=generate)
    thread.start()
    assert running.wait(timeout=60)
    turbo.apply(english, {"decoding": {"enabled": False}})
    order.append("applied")
    thread.join()
    assert sorted(order) == ["applied", "generated"]
    assert english.turbo.plan.step("decoding").status == "off"


def test_a_call_that_waited_while_the_model_was_reverted_runs_as_the_model_is_then(english, recwarn):
    """The guard of the reverted configuration would no longer see the watermarker, and mark the output twice."""
    turbo.apply(english, QUIET)
    entered, result = threading.Event(), []

    def generate():
        entered.set()
        result.append(english.generate(TEXTS[0]))

    with english.turbo.lock:
        thread = threading.Thread(target=generate)
        thread.start()
        entered.wait(timeout=10)
        time.sleep(0.2)  # until it waits for the lock
        turbo.revert(english)
    thread.join()
    assert len(result) == 1
    assert not [w for w in recwarn if issubclass(w.category, WatermarkWarning)], "a retired scope was still in force"


def test_first_applies_of_two_threads_leave_one_layer(english):
    before, start = set(vars(english)), threading.Barrier(2)

    def apply():
        start.wait(timeout=10)
        turbo.apply(english, QUIET)

    threads = [threading.Thread(target=apply) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {"decoding", "watermark"} <= set(english.turbo.plan.running)
    turbo.revert(english)
    assert set(vars(english)) == before


POOLS = """
import os, time
import torch
from chatterbox_turbo.runtime.cpu.threads import apart

def compute():
    torch.set_num_threads(2)
    return float((torch.ones(512, 512) @ torch.ones(512, 512)).relu().sum())

def threads():
    time.sleep(0.2)
    return len(os.listdir("/proc/self/task"))

found = []
for _ in range(2):
    assert apart(compute) == 512.0**3
    found.append(threads())
compute()
found.append(threads())
print(found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_thread_of_its_own_leaves_no_pool_behind():
    done = subprocess.run([sys.executable, "-c", POOLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, here = json.loads(done.stdout)
    assert first == second < here


def test_what_it_raises_is_raised_here():
    def wrong():
        raise InvalidRequestError("No.")

    with pytest.raises(InvalidRequestError, match="No"):
        apart(wrong)
    assert not [thread for thread in threading.enumerate() if thread.name == "loading"]
