"""TF32: refused where it would do nothing, scoped to the call where it does something."""

from __future__ import annotations

import threading

import pytest
from cases import speak

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import UnavailablePassError
from chatterbox_turbo.passes.base import Call
from chatterbox_turbo.passes.precision import scope
from chatterbox_turbo.runtime.tf32 import _switches, tf32

LOSSY = {"fidelity": "lossy", "decoding": {"progress": "off"}}


def values():
    return [getattr(owner, name) for owner, name, _ in _switches()]


def wanted():
    return [value for _, _, value in _switches()]


def test_on_a_cpu_it_is_skipped_with_the_reason(english):
    step = turbo.inspect(english, {**LOSSY, "precision": {"tf32": True}}).step("precision")
    assert (step.status, step.fidelity) == ("skipped", "lossy") and "CUDA" in step.reason
    with pytest.raises(UnavailablePassError, match="CUDA"):
        turbo.apply(english, {**LOSSY, "precision": {"tf32": True, "enabled": True}})


def test_the_switches_are_put_back_also_after_an_exception():
    before = values()
    assert before != wanted()
    with pytest.raises(KeyError), scope(Call((), {})):
        assert values() == wanted()
        raise KeyError
    assert values() == before


def test_overlapping_scopes_of_two_threads_restore_the_state_before_both():
    before, inside, leave = values(), threading.Event(), threading.Event()

    def other():
        with tf32():
            inside.set()
            leave.wait(timeout=10)

    thread = threading.Thread(target=other)
    with tf32():
        thread.start()
        inside.wait(timeout=10)
    assert values() == wanted(), "the first to leave took TF32 from the other"
    leave.set()
    thread.join()
    assert values() == before


@pytest.mark.gpu
def test_on_a_gpu_it_is_on_while_generating_only():
    from chatterbox_turbo import synthetic

    model = synthetic.build("english", "tiny", device="cuda")
    seen = []
    model.s3gen.flow.encoder.register_forward_pre_hook(lambda *_: seen.append(values()))
    before = values()
    with turbo.optimized(model, {**LOSSY, "precision": {"tf32": True, "enabled": True}}):
        speak(model)
        assert values() == before
    assert seen == [wanted()]
