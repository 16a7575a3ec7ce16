"""The pass attention on a CPU: every kernel against the definition, batches, what is refused, and nothing global."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import request_for, speak
from faults import Injected as InjectedFault
from faults import faults_around
from snapshots import difference, snapshot
from test_precision import needs_bf16

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError, UnavailablePassError
from chatterbox_turbo.measure.fidelity import compare, snr_db
from chatterbox_turbo.runtime.device import attention_kernels
from chatterbox_turbo.runtime.device.attention_kernels import HALF, Wanted, choose, kernel_for, why_not
from chatterbox_turbo.runtime.s3gen.attention import Relative, attend, hiding
from chatterbox_turbo.runtime.s3gen.flow_estimator import constant, velocity
from chatterbox_turbo.runtime.s3gen.flow_solver import FlowSolver, schedule
from chatterbox_turbo.runtime.s3gen.scratch import Scratch
from chatterbox_turbo.runtime.s3gen.speech_encoder import SpeechEncoder
from chatterbox_turbo.upstream import encoder_weights, flow_weights

CPU = torch.device("cpu")
ON_CPU = (Wanted("eager"), Wanted("sdpa"), Wanted("sdpa", "flash"), Wanted("sdpa", "math"))
PARTS = ("prefill", "flow", "encoder")
STATIC = {"progress": "off", "backbone": "static", "kernel": "torch", "huge_pages": False}


def asked(wanted, parts=PARTS, **others):
    """A configuration in which the parts are asked for by that kernel, and the passes that read it run."""
    section = {"enabled": True, **dict.fromkeys(parts, wanted.name), "kernel": wanted.kernel}
    return {"decoding": STATIC, "attention": section, **others}


def heads(frames=40, dtype=torch.float32, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, frames, 3, 64, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


# -- kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ON_CPU, ids=str)
@pytest.mark.parametrize("dtype, floor", [(torch.float32, 110), (torch.bfloat16, 30)])
def test_every_kernel_computes_the_definition(wanted, dtype, floor):
    kernel, (q, k, v) = kernel_for(wanted, CPU), heads()
    q, k, v = (one.to(dtype) for one in (q, k, v))
    valid = torch.arange(40) < torch.tensor([[40], [17]])
    scores = torch.einsum("rhqd,rhkd->rhqk", q.double(), k.double()) / 8
    later = torch.ones(40, 40, dtype=torch.bool).triu(1)
    for hidden, given in (
        (torch.zeros(1, dtype=torch.bool), kernel(q, k, v, kernel.hide(None))),
        (~valid[:, None, None], kernel(q, k, v, kernel.hide(hiding(valid, dtype)))),
        (later, kernel(q, k, v, causal=True)),
    ):
        expected = scores.masked_fill(hidden, -float("inf")).softmax(-1) @ v.double()
        assert given.dtype == dtype and given.shape == q.shape
        assert snr_db(given.double(), expected) > floor


@pytest.mark.parametrize("wanted", ON_CPU, ids=str)
def test_positions_are_added_by_every_kernel(wanted):
    (q, k, v), scratch = heads(), Scratch()
    relative = Relative(q.contiguous() * 0.1, torch.randn(3, 79, 64))
    bias = hiding(torch.arange(40) < torch.tensor([[40], [17]]), torch.float32)
    expected = attend(q, k, v, bias, scratch, relative).clone()
    assert snr_db(attend(q, k, v, bias, scratch, relative, kernel_for(wanted, CPU)), expected) > 100
    assert snr_db(attend(q, k, v, bias, scratch), expected) < 40


@pytest.mark.parametrize("wanted", ON_CPU, ids=str)
def test_what_is_had_has_been_compared_with_the_definition(wanted, monkeypatch):
    for positions in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            assert why_not(wanted, dtype, CPU, 64, positions) == ""
    kernel = kernel_for(wanted, CPU)

    def wrong(*args):
        return kernel.attend(*args) * 1.1

    monkeypatch.setattr(attention_kernels, "kernel_for", lambda *_: attention_kernels.Kernel("wrong", wrong))
    assert "differs from the definition" in why_not(wanted, torch.float32, CPU, 64)

    def broken(*args):
        raise TypeError("an operator with another signature")

    monkeypatch.setattr(attention_kernels, "kernel_for", lambda *_: attention_kernels.Kernel("broken", broken))
    assert "another signature" in why_not(wanted, torch.float32, CPU, 64)


def test_asking_draws_no_random_numbers():
    state = torch.get_rng_state()
    assert not why_not(Wanted("eager"), torch.float32, CPU, 64)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "wanted, positions, reason",
    [
        (Wanted("sdpa", "efficient"), False, "no efficient kernel for cpu; there it has flash and math"),
        (Wanted("sdpa", "cudnn"), False, "no cudnn kernel for cpu"),
        (Wanted("flash_attention_2"), False, "needs a CUDA device, the model is on cpu"),
        (Wanted("flash_attention_2"), True, "relative positions"),
    ],
)
def test_what_a_cpu_does_not_have_is_said(wanted, positions, reason):
    assert reason in why_not(wanted, torch.float32, CPU, 64, positions)
    kernel, remark = choose(wanted, torch.float32, CPU, 64, positions)
    assert kernel is None and reason in remark and str(wanted) in remark


def test_no_switch_of_torchs_is_touched():
    """Two threads attend by two kernels at once, and a third one sees every kernel allowed."""
    names = [name for name in dir(torch.backends.cuda) if name.endswith("_sdp_enabled")]
    assert len(names) >= 3

    def switches():
        return {name: getattr(torch.backends.cuda, name)() for name in names}

    before, seen, errors, held = switches(), [], [], set()
    inside, leave = threading.Barrier(3, timeout=20), threading.Barrier(3, timeout=20)

    class Slow(torch.Tensor):
        """Waits in the first function of torch's that it is given to: a dispatch mode's flag is the whole process's."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if threading.get_ident() not in held:
                held.add(threading.get_ident())
                inside.wait()
                leave.wait()
            return super().__torch_function__(func, types, args, kwargs or {})

    def run(wanted):
        try:
            kernel_for(wanted, CPU)(*(one.as_subclass(Slow) for one in heads()), causal=True)
        except Exception as error:
            errors.append(error)
            inside.abort()

    threads = [threading.Thread(target=run, args=(Wanted("sdpa", kernel),)) for kernel in ("flash", "math")]
    for thread in threads:
        thread.start()
    inside.wait()
    seen.append(switches())
    leave.wait()
    for thread in threads:
        thread.join()
    assert not errors and seen == [before] and switches() == before


# -- parts that are built with one ---------------------------------------------------------------------------------


@pytest.fixture
def fused(english):
    from chatterbox_turbo.patching import Journal

    journal = Journal()
    flow_weights.fuse(english.s3gen, journal)
    encoder_weights.fuse(english.s3gen, journal)
    yield english
    journal.undo()


@pytest.mark.parametrize("wanted", ON_CPU[:1] + ON_CPU[2:], ids=str)
def test_padded_utterances_of_a_batch_equal_their_own_runs(fused, wanted):
    kernel, lengths, generator = kernel_for(wanted, CPU), (50, 23), torch.Generator().manual_seed(0)
    noise, mean, condition = (torch.randn(2, 80, 50, generator=generator) for _ in range(3))
    speaker, times = torch.randn(2, 80, generator=generator), schedule(2, True, CPU)
    x = torch.randn(2, 50, 512, generator=generator)
    with torch.no_grad():
        solver = FlowSolver(flow_weights.read(fused.s3gen), kernel=kernel)
        encoder = SpeechEncoder(encoder_weights.read(fused.s3gen), kernel)
        usual = FlowSolver(flow_weights.read(fused.s3gen)), SpeechEncoder(encoder_weights.read(fused.s3gen))
        projections = flow_weights.time_projections(fused.s3gen, times)

        def solve(by, some, length, **options):
            parts = (one[some, :, :length] for one in (noise, mean, condition))
            noise_, mean_, condition_ = parts
            return by.solve(noise_, times, projections, mean_, speaker[some], condition_, guidance=0.7, **options)

        together = solve(solver, slice(None), 50, lengths=lengths)
        encoded = encoder(x, lengths)
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            alone = solve(solver, one, length)
            assert snr_db(together[one, :, :length], alone) > 90
            assert snr_db(alone, solve(usual[0], one, length)) > 90
            states = encoder(x[one, :length], [length])
            assert snr_db(encoded[one, : 2 * length], states) > 90
            assert snr_db(states, usual[1](x[one, :length], [length])) > 90


@pytest.mark.parametrize("wanted", ON_CPU, ids=str)
def test_a_step_with_it_can_be_compiled_in_one_piece(fused, wanted):
    kernel = kernel_for(wanted, CPU)
    with torch.no_grad():
        weights = flow_weights.read(fused.s3gen)
        state, mean = torch.randn(1, 24, 80), torch.randn(2, 24, 80)
        times = flow_weights.time_projections(fused.s3gen, torch.tensor([0.0, 1.0]))[0]
        start = constant(weights, mean, torch.randn(2, 80), mean)
        bias = hiding(torch.arange(24)[None] < torch.tensor([[24], [20]]), torch.float32)
        plain = velocity(weights, state, start, times, bias, Scratch(), kernel)
        compiled = torch.compile(velocity, backend="eager", fullgraph=True)
        assert snr_db(compiled(weights, state, start, times, bias, Scratch(), kernel), plain) > 90
    torch._dynamo.reset()


# -- the pass ------------------------------------------------------------------------------------------------------


def test_by_default_nothing_is_asked_for(english):
    assert turbo.inspect(english, "auto").step("attention").status == "off"


@pytest.mark.parametrize(
    "section, said",
    [
        ({"enabled": True}, "nothing to enable"),
        ({"enabled": False, "flow": "eager"}, "drop one of the two"),
        (
            {"flow": "eager", "kernel": "math"},
            'none of attention.prefill, attention.flow and attention.encoder is "sdpa"',
        ),
        ({"flow": "flash_attention_2"}, 'attention is lossy, above the ceiling fidelity = "numerical"'),
        ({"flow": "flash"}, "attention.flow"),
    ],
)
def test_contradictions_are_refused(section, said):
    with pytest.raises(InvalidConfigError) as error:
        turbo.OptimizationConfig(attention=section)
    assert said in str(error.value)


@pytest.mark.parametrize("wanted", [Wanted("eager"), Wanted("sdpa", "math")], ids=str)
@pytest.mark.parametrize("model", ["english", "turbo"], indirect=True)
def test_it_keeps_its_promise(model, wanted):
    for comparison in compare(model, asked(wanted), [request_for(model)], seeds=(3,)):
        assert comparison.broken("numerical") == ""


def test_the_parts_that_ask_attend_by_it_and_no_others(english, monkeypatch):
    """How often the kernel is called, by what only one part asks of it."""
    calls, eager = [], attention_kernels.eager

    def counted(q, k, v, bias=None, causal=False):
        part = "prefill" if causal else "flow" if bias is None or bias.size(1) == 1 else "encoder"
        calls.append(part)
        return eager(q, k, v, bias, causal)

    for parts in ((), PARTS[:1], PARTS[1:2], PARTS[2:], PARTS):
        config = asked(Wanted("eager"), parts) if parts else {"decoding": STATIC}
        with turbo.optimized(english, config):
            # what apply compares is counted by no one
            backbone = english.turbo._engines.token_model.backbone
            encoder, solver = english.turbo._engines.flow.prepared.value
            for owner in (backbone, encoder, solver):
                if owner._kernel is not None:
                    owner._kernel = attention_kernels.Kernel("eager", counted)
            calls.clear()
            speak(english)
        assert set(calls) == set(parts)


def test_revert_leaves_no_trace_and_faults_undo_it(english, monkeypatch):
    speak(english)  # what upstream keeps of its first call
    before = snapshot(english)
    turbo.apply(english, asked(Wanted("sdpa", "math")))
    speak(english)
    turbo.revert(english)
    assert difference(before, snapshot(english)) == []
    with monkeypatch.context() as patch:
        faults_around(patch, "attention").arm(1)
        with pytest.raises(InjectedFault):
            turbo.apply(english, asked(Wanted("eager")))
    assert difference(before, snapshot(english)) == []


def test_a_part_that_cannot_have_it_is_reported_and_the_others_run(english):
    config = {
        "fidelity": "lossy",
        "decoding": STATIC,
        "attention": {"prefill": "eager", "encoder": "flash_attention_2"},
    }
    turbo.apply(english, config)
    step = english.turbo.plan.step("attention")
    assert (step.status, step.fidelity) == ("on", "lossy")
    assert "prefill by eager" in step.reason
    assert "encoder not by flash_attention_2: flash-attn adds nothing to the scores" in step.reason
    report = str(english.turbo.report())
    assert "prefill's attention by eager" in report and "encoder's attention" not in report
    assert torch.isfinite(speak(english)).all()


@pytest.mark.parametrize("section", [{"encoder": "flash_attention_2"}, {"flow": "sdpa", "kernel": "cudnn"}])
def test_what_is_demanded_and_cannot_be_had_is_an_error(english, section):
    before = snapshot(english)
    config = {"fidelity": "lossy", "decoding": STATIC, "attention": section}
    assert turbo.inspect(english, config).step("attention").status == "skipped"
    with pytest.raises(UnavailablePassError, match=r"'attention' is demanded but cannot run: (encoder|flow): "):
        turbo.apply(english, {**config, "attention": {**section, "prefill": "eager", "enabled": True}})
    assert difference(before, snapshot(english)) == []


def test_parts_that_upstream_computes_are_told(models):
    reasons = {
        "the model has no T3": (models("vc"), {}),
        "needs the static backbone": (models("english"), {"decoding": {"backbone": "upstream"}}),
        "it needs the pass decoding": (models("english"), {"decoding": {"enabled": False}}),
    }
    for said, (model, config) in reasons.items():
        step = turbo.inspect(model, {**config, "attention": {"prefill": "eager"}}).step("attention")
        assert step.status == "skipped" and said in step.reason
    step = turbo.inspect(models("vc"), {"flow": {"enabled": False}, "attention": {"flow": "eager"}}).step("attention")
    assert step.status == "skipped" and "it needs the pass flow" in step.reason


@needs_bf16
def test_half_precision_is_lossy_and_found_before_anything_is_cast(english):
    bf16 = {"fidelity": "lossy", "precision": {"flow": "bfloat16"}, "attention": {"flow": "eager", "prefill": "eager"}}
    assert turbo.inspect(english, bf16).step("attention").fidelity == "lossy"
    fp32 = {**bf16, "precision": {}}
    assert turbo.inspect(english, fp32).step("attention").fidelity == "numerical"
    prefill = {**bf16, "precision": {"t3": "bfloat16"}}  # attends in fp32 on a CPU
    assert turbo.inspect(english, prefill).step("attention").fidelity == "numerical"
    turbo.apply(english, bf16)
    _, solver = english.turbo._engines.flow.prepared.value
    assert solver.weights.dtype in HALF and solver._kernel.name == "eager"
    assert torch.isfinite(speak(english)).all()


def test_weights_that_are_cast_afterwards_are_decided_anew(fresh):
    model = fresh("english")
    turbo.apply(model, {"fidelity": "lossy", "decoding": STATIC, "attention": {"flow": "sdpa", "kernel": "math"}})
    try:
        model.s3gen.flow.decoder.estimator.bfloat16()
        speak(model)
        _, solver = model.turbo._engines.flow.prepared.value
        assert solver.weights.dtype == torch.bfloat16 and solver._kernel.name == "sdpa (math)"
        assert model.turbo.plan.step("attention").fidelity == "lossy"
    finally:
        turbo.revert(model)
        model.s3gen.flow.decoder.estimator.float()


def test_the_own_choice_stays_where_nothing_is_asked(english):
    turbo.apply(english, {"decoding": STATIC})
    encoder, solver = english.turbo._engines.flow.prepared.value
    owners = (english.turbo._engines.token_model.backbone, encoder, solver)
    assert [owner._kernel for owner in owners] == [None] * 3
