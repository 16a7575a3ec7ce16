"""Parts that leave a CPU's memory: pages go and come back, values, addresses and what is made of them stay."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from cases import difference, request_for, snapshot, speak

import chatterbox_turbo as turbo
from chatterbox_turbo import OptimizationConfig, synthetic
from chatterbox_turbo.errors import InvalidConfigError, TurboError, UnavailablePassError
from chatterbox_turbo.passes import offload as pass_file
from chatterbox_turbo.passes import vocoder as vocoder_pass
from chatterbox_turbo.runtime.cpu import cold
from chatterbox_turbo.runtime.cpu.cold import ColdPages, ColdPart
from chatterbox_turbo.runtime.device.free_memory import is_out_of_memory
from chatterbox_turbo.runtime.device.transfers import Transfers
from chatterbox_turbo.upstream import conditioning as upstream_conditioning
from chatterbox_turbo.upstream.families import identify

pytestmark = pytest.mark.skipif(bool(cold.why_not()), reason=cold.why_not() or "runs here")
QUIET = {"decoding": {"progress": "off", "kernel": "torch"}}


@pytest.fixture(scope="module")
def own(fresh):
    return fresh("english")


@pytest.fixture
def model(own):
    voice = own.conds
    yield own
    turbo.revert(own)
    own.conds = voice


def residence_of(model):
    """What moves the parts of an optimized model."""
    setting = next(s for s in model.turbo._settings if isinstance(getattr(s, "__self__", None), pass_file.Residence))
    return setting.__self__


def pages(model, name):
    return residence_of(model).places[name].pages


def apply(model, mode, **options):
    return turbo.apply(model, {**QUIET, "offload": {"mode": mode, **options}})


def lines(text):
    return [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if text in line]


# ---- pages


def test_pages_go_and_come_back(tmp_path):
    """Two views of one storage go on being that; what is written stays, also where pages are let go again."""
    whole = torch.arange(2**18, dtype=torch.float32).reshape(512, 512)
    first, second = torch.nn.Parameter(whole[:256]), torch.nn.Parameter(whole[256:])
    copy = whole.clone()
    del whole
    part = ColdPart([first, second], tmp_path)
    assert part.leave() >= 2**20
    assert os.listdir(tmp_path) == []  # the file has no name
    laid, at = part.pages, first.data_ptr()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    laid.drop()
    assert laid.resident() == 0
    assert torch.equal(first, copy[:256]) and torch.equal(second, copy[256:])
    assert laid.resident() >= 2**20
    with torch.no_grad():
        first[3, 4] = -1.0
    assert part.leave() >= 2**20 - cold.PAGE
    assert laid.resident() == cold.PAGE  # the one that was written to
    assert first[3, 4] == -1.0 and first.data_ptr() == at
    part.restore()
    copy[3, 4] = -1.0
    assert torch.equal(first, copy[:256]) and first.data_ptr() != at
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    gc.collect()
    assert not lines(str(tmp_path))


def test_weights_of_a_mapped_checkpoint_stay_in_its_file(tmp_path):
    """Nothing is written for them, and their pages go."""
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.randn(512, 512)}, tmp_path / "a.safetensors")
    weight = load_file(tmp_path / "a.safetensors")["a"]
    total, at = weight.sum(), weight.data_ptr()
    laid = ColdPages([weight], tmp_path / "missing")
    assert laid.spilled == 0 and laid.nbytes > 0 and weight.data_ptr() == at
    assert laid.drop() > 0 and laid.resident() == 0
    assert weight.sum() == total
    laid.restore()
    assert weight.data_ptr() == at


def test_a_full_disk(model, monkeypatch):
    """The model is as it was, and the message says what to do."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = snapshot(model)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TurboError, match=r"No space left.*offload\.folder"):
        apply(model, "idle")
    assert difference(before, snapshot(model)) == []
    assert not hasattr(model, "turbo")


def test_where_pages_cannot_go(model, monkeypatch, tmp_path):
    assert "tmpfs" in cold.spill_folder("/dev/shm")[1] or cold._kind_of(Path("/dev/shm")) not in cold.IN_MEMORY
    apply(model, "idle", folder=str(tmp_path / "nowhere"))
    assert model.turbo.plan.step("offload").status == "skipped"
    assert "offload.folder" in model.turbo.plan.step("offload").reason
    monkeypatch.setattr(cold, "PAGEMAP", tmp_path / "pagemap")
    with pytest.raises(UnavailablePassError, match="pagemap"):
        apply(model, "idle", enabled=True)


def test_contradictions():
    with pytest.raises(InvalidConfigError, match="free_again"):
        OptimizationConfig(offload={"mode": "adaptive", "free_below": 0.3})
    with pytest.raises(InvalidConfigError, match="mode is off"):
        OptimizationConfig(offload={"enabled": True})


# ---- modes


def test_sequential(model, voice):
    """Same samples; between requests nothing is resident, and nothing is made anew."""
    turbo.apply(model, QUIET)
    plain = speak(model)
    apply(model, "sequential")
    assert torch.equal(speak(model), plain)
    engines = model.turbo._engines
    every = (engines.token_model.prepared, engines.flow.prepared, engines.vocoder.prepared)
    values = [prepared.value for prepared in every]
    for name in ("voice", "t3", "flow", "vocoder"):
        assert pages(model, name).resident() <= 2 * cold.PAGE, name
    model.prepare_conditionals(voice)
    assert pages(model, "voice").resident() <= 2 * cold.PAGE
    speak(model)
    assert [prepared.value for prepared in every] == values
    assert model.turbo.renewals == ()
    assert "sequential: voice" in model.turbo.plan.step("offload").reason
    moved = residence_of(model)._transfers.to_dict()["by"]
    assert moved["t3 leaves"]["count"] >= 2


def test_idle_keeps_what_speaks(model, voice):
    apply(model, "idle")
    addresses = [p.data_ptr() for p in model.t3.parameters()]
    speak(model, audio_prompt_path=voice)
    assert pages(model, "voice").resident() <= 2 * cold.PAGE
    assert pages(model, "t3") is None and [p.data_ptr() for p in model.t3.parameters()] == addresses


def test_voice_conversion_keeps_its_tokenizer(fresh):
    vc = fresh("vc")
    apply(vc, "sequential")
    try:
        held = {id(t) for place in residence_of(vc).places.values() for t in place._tensors}
        assert not held & {id(p) for p in vc.s3gen.tokenizer.parameters()}
        assert held >= {id(p) for p in vc.s3gen.speaker_encoder.parameters()}
        speak(vc)
    finally:
        turbo.revert(vc)


def test_revert_brings_everything_back(model):
    speak(model)  # upstream keeps an embedding in the voice
    before = snapshot(model)
    mapped = len(lines("(deleted)"))
    apply(model, "sequential")
    speak(model)
    assert len(lines("(deleted)")) > mapped
    turbo.revert(model)
    gc.collect()
    assert difference(before, snapshot(model)) == []
    assert len(lines("(deleted)")) == mapped


@pytest.mark.exhaustive
def test_many_requests(model):
    """Placement, hooks, mappings and weights as after the first."""
    apply(model, "sequential")
    speak(model)

    def state():
        gc.collect()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.t3.modules())
        resident = [pages(model, name).resident() for name in residence_of(model).places]
        addresses = [p.data_ptr() for p in (*model.t3.parameters(), *model.s3gen.parameters())]
        return hooks, resident, addresses, len(lines("(deleted)")), len(os.listdir("/proc/self/fd"))

    first = state()
    for _ in range(30):
        speak(model, text="Yes.")
    speak(model)
    assert state() == first


def test_two_models(model, fresh):
    other = fresh("turbo")
    turbo.apply(model, QUIET)
    turbo.apply(other, QUIET)
    plain = speak(model), speak(other)
    apply(model, "sequential")
    apply(other, "sequential")
    try:
        for _ in range(2):
            assert torch.equal(speak(model), plain[0])
            assert torch.equal(speak(other), plain[1])
    finally:
        turbo.revert(other)


def test_batches(model):
    items = [{**request_for(model, text), "seed": seed} for seed, text in enumerate(("One.", "Two and three."))]
    turbo.apply(model, QUIET)
    plain = model.turbo.batch(items)
    apply(model, "sequential")
    transfers = residence_of(model)._transfers
    transfers.clear()
    assert all(map(torch.equal, model.turbo.batch(items), plain))
    assert transfers.to_dict()["by"]["t3 leaves"]["count"] == 1  # not once for each utterance
    assert pages(model, "t3").resident() <= 2 * cold.PAGE


# ---- faults


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
