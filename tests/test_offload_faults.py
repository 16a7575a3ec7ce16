"""Offload where something goes wrong: errors in any phase, too little memory, parts that are cast."""

from __future__ import annotations

import contextlib

import offload_tools
import pytest
import torch
from cases import speak
from offload_tools import QUIET, apply, lines, pages, residence_of

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import TurboError
from chatterbox_turbo.passes import offload as pass_file
from chatterbox_turbo.passes import vocoder as vocoder_pass
from chatterbox_turbo.runtime.cpu import cold
from chatterbox_turbo.runtime.device.transfers import Transfers
from chatterbox_turbo.runtime.memory.free_memory import is_out_of_memory
from chatterbox_turbo.runtime.s3gen.streaming import Windows
from chatterbox_turbo.speech.stream import joined
from chatterbox_turbo.upstream import conditioning as upstream_conditioning
from chatterbox_turbo.upstream.families import identify

own, model = offload_tools.own, offload_tools.model
pytestmark = pytest.mark.skipif(bool(cold.why_not()), reason=cold.why_not() or "runs here")


@contextlib.contextmanager
def failing_in(model, phase, error, monkeypatch):
    """What computes in a phase raises, after it has touched the weights."""
    engines, residence = model.turbo._engines, residence_of(model)
    owner, name = {
        "voice": (upstream_conditioning, "speaker_embedding"),
        "t3": (engines.token_model, "_loop"),
        "flow": (engines.flow, "_solve"),
        "vocoder": (vocoder_pass, "synthesize"),
    }[phase]

    def fail(*args, **kwargs):
        assert sum(float(t.detach().double().sum()) for t in residence.places[phase]._tensors) != 0
        assert pages(model, phase).resident() > 2 * cold.PAGE
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_in_any_phase(model, voice, error, monkeypatch):
    """Every part rests where the plan says, and the next request is as good as any."""
    apply(model, "sequential")
    plain = speak(model)
    for phase in ("voice", "t3", "flow", "vocoder"):
        with failing_in(model, phase, error, monkeypatch), pytest.raises(type(error)):
            model.prepare_conditionals(voice) if phase == "voice" else speak(model)
        for one in residence_of(model).places:
            assert pages(model, one).resident() <= 2 * cold.PAGE, (phase, one)
    assert torch.equal(speak(model), plain)
    assert model.turbo.renewals == ()


class Short:
    """A machine whose memory a test decides about."""

    def __init__(self, free):
        self.free = free

    def __call__(self, device):
        return self.free, 1000


def test_adaptive(model, monkeypatch):
    """Sequential below the one share, idle again above the other with all parts back, and not in between."""
    memory = Short(500)
    monkeypatch.setattr(pass_file, "free_memory", memory)
    apply(model, "adaptive")
    residence = residence_of(model)
    for place in residence.places.values():
        place.nbytes = 10
    plain = speak(model)
    assert not residence.sequential and pages(model, "t3") is None
    for free, sequential in ((99, True), (150, True), (229, True), (231, False), (150, False)):
        memory.free = free
        assert torch.equal(speak(model), plain)
        assert residence.sequential is sequential, free
    assert "now idle" in model.turbo.plan.step("offload").reason


def test_adaptive_lets_a_stream_end_first(model, monkeypatch):
    """Its batch would lose its cache."""
    memory, text = Short(500), "The quick brown fox."
    monkeypatch.setattr(pass_file, "free_memory", memory)
    apply(model, "adaptive")
    windows = Windows(first_chunk=3, chunk=3, growth=1.0, longest_chunk=3)
    plain = joined(list(model.turbo.stream(text, seed=1, windows=windows)))
    with model.turbo.stream(text, seed=1, windows=windows) as stream:
        blocks = [next(stream)]
        memory.free = 50
        assert len(model.turbo.token_model.service) == 1
        for block in stream:
            blocks.append(block)
    assert torch.equal(joined(blocks), plain)
    speak(model)
    assert residence_of(model).sequential


@pytest.mark.parametrize("mode", ["adaptive", "idle"])
@pytest.mark.parametrize("phase", ["t3", "flow"])
def test_out_of_memory(model, monkeypatch, mode, phase):
    """One more try in the lower mode, with the same random numbers; reported. Without adaptive the error stays."""
    monkeypatch.setattr(pass_file, "free_memory", Short(900))
    turbo.apply(model, QUIET)
    plain = speak(model)
    apply(model, mode)
    engines, failures = model.turbo._engines, []
    owner, name = {"t3": (engines.token_model, "_loop"), "flow": (engines.flow, "_solve")}[phase]
    compute = getattr(owner, name)

    def short_of_memory(*args):
        if mode == "idle" or not residence_of(model).sequential:
            failures.append(residence_of(model).sequential)
            raise torch.OutOfMemoryError("out of memory")
        return compute(*args)

    monkeypatch.setattr(owner, name, short_of_memory)
    if mode == "idle":
        with pytest.raises(torch.OutOfMemoryError):
            speak(model)
        assert len(failures) == 1
        return
    assert torch.equal(speak(model), plain)
    assert failures == [False]
    assert "out of memory" in str(model.turbo.report())


def test_out_of_memory_again(model, monkeypatch):
    """There is one retry: the second failure is the caller's, and parts rest where the lower mode has them."""
    monkeypatch.setattr(pass_file, "free_memory", Short(900))
    apply(model, "adaptive")
    tries = []

    def short_of_memory(*_):
        tries.append(residence_of(model).sequential)
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.turbo._engines.flow, "_solve", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            speak(model)
    assert tries == [False, True]
    for one in residence_of(model).places:
        assert pages(model, one).resident() <= 2 * cold.PAGE, one
    speak(model)


def test_out_of_memory_while_parts_come_back(model, monkeypatch):
    """Revert says so; every other part is in ordinary memory, and the one that had no room works where it is."""
    turbo.apply(model, QUIET)
    plain = speak(model)
    apply(model, "sequential")
    parts = residence_of(model).places

    def no_room():
        raise MemoryError("no room")

    mapped = len(lines("(deleted)"))
    monkeypatch.setattr(parts["flow"], "restore", no_room)
    with pytest.raises(TurboError, match=r"offloaded parts.*no room"):
        turbo.revert(model)
    assert not hasattr(model, "turbo")
    assert parts["t3"].pages is parts["vocoder"].pages is None and parts["flow"].pages is not None
    assert 0 < len(lines("(deleted)")) < mapped
    turbo.apply(model, QUIET)
    assert torch.equal(speak(model), plain)


def test_kinds_of_errors():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not is_out_of_memory(RuntimeError("shapes"))


def test_a_server_casts_a_part(fresh):
    """The configuration is applied again to what the part is now."""
    one = synthetic.build("english", "tiny", stop_after=8)
    apply(one, "sequential")
    speak(one)
    one.t3.to("cpu")
    one.s3gen.flow.float()
    speak(one)
    assert one.turbo.renewals == ()
    one.t3.bfloat16()
    with contextlib.suppress(RuntimeError):  # upstream's conditioning does not take bfloat16
        speak(one)
    assert len(one.turbo.renewals) == 1
    assert pages(one, "t3").resident() <= 2 * cold.PAGE
    turbo.revert(one)
    assert one.t3.speech_head.weight.dtype == torch.bfloat16
    assert Transfers().to_dict()["count"] == 0
    assert identify(one).family == "english"
