"""Flow matching: the solver against upstream's loops, masks and batches, half precision, knobs, faults."""

from __future__ import annotations

import pytest
import torch
from cases import request_for, speak
from test_precision import needs_bf16

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError, UnavailablePassError
from chatterbox_turbo.measure.fidelity import compare, snr_db
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.cpu import onednn as products
from chatterbox_turbo.runtime.s3gen.flow_solver import FlowSolver, schedule
from chatterbox_turbo.upstream import flow_weights

LENGTHS = (37, 90, 64)
HALF = {"fidelity": "lossy", "precision": {"flow": "bfloat16", "enabled": True}}


def problem(frames, rows=1, seed=0):
    """Noise, mean, condition (rows, 80, frames) and speaker (rows, 80)."""
    generator = torch.Generator().manual_seed(seed)
    noise, mean, condition = (torch.randn(rows, 80, frames, generator=generator) for _ in range(3))
    return noise, mean, torch.randn(rows, 80, generator=generator), condition


@torch.inference_mode()
def upstreams(model, noise, mean, speaker, condition, steps):
    decoder, mean_flow = model.s3gen.flow.decoder, flow_weights.is_mean_flow(model.s3gen)
    times = schedule(steps, not mean_flow, torch.device("cpu"))
    solve = decoder.basic_euler if mean_flow else decoder.solve_euler
    return solve(noise, times, mean, torch.ones_like(mean[:, :1]), speaker, condition)


@torch.inference_mode()
def ours(model, noise, mean, speaker, condition, steps, **options):
    with torch.inference_mode(False):
        solver = FlowSolver(flow_weights.read(model.s3gen))
    mean_flow = flow_weights.is_mean_flow(model.s3gen)
    times = schedule(steps, not mean_flow, torch.device("cpu"))
    guidance = None if mean_flow else model.s3gen.flow.decoder.inference_cfg_rate
    projections = flow_weights.time_projections(model.s3gen, times)
    return solver.solve(noise, times, projections, mean, speaker, condition, guidance=guidance, **options)


@pytest.fixture
def fused(models):
    """``fused(family)``: the session's model with the estimator's weights laid out for the solver."""
    journal = Journal()

    def get(family):
        model = models(family)
        flow_weights.fuse(model.s3gen, journal)
        return model

    yield get
    journal.undo()


@pytest.mark.parametrize("family, steps", [("english", 10), ("turbo", 2)])
@pytest.mark.parametrize("frames", [1, 2, 63, 200])
def test_solver_equals_upstreams_loop(fused, family, steps, frames):
    model = fused(family)
    given = problem(frames)
    assert snr_db(ours(model, *given, steps), upstreams(model, *given, steps)) > 100


@pytest.mark.parametrize("family", ["english", "turbo"])
def test_padded_utterances_equal_their_own_runs(fused, family):
    model = fused(family)
    given = problem(max(LENGTHS), len(LENGTHS))
    together = ours(model, *given, 3, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        noise, mean, speaker, condition = (part[row : row + 1] for part in given)
        alone = ours(model, noise[..., :length], mean[..., :length], speaker, condition[..., :length], 3)
        assert snr_db(together[row : row + 1, :, :length], alone) > 100


def test_lengths_that_a_graph_pads_give_the_same(fused, monkeypatch):
    model, given = fused("english"), problem(70)
    plain = ours(model, *given, 2)
    with torch.inference_mode(False):
        solver = FlowSolver(flow_weights.read(model.s3gen))
    solver.longest, solver.pays_after = FlowSolver.longest, 0  # what graphs ask for, without graphs
    monkeypatch.setattr("test_flow.FlowSolver", lambda weights: solver)
    assert snr_db(ours(model, *given, 2), plain) > 100
    assert solver.runner.captured == [(80, 2, 1, True)]


def test_half_of_the_steps_guided(fused):
    """Against the definition: guided with upstream's weight first, then the given velocity alone."""
    model, given = fused("english"), problem(50)
    half = ours(model, *given, 4, guided_steps=2)
    assert 5 < snr_db(half, ours(model, *given, 4)) < 60
    assert torch.equal(ours(model, *given, 4, guided_steps=4), ours(model, *given, 4))
    decoder, kept = model.s3gen.flow.decoder, model.s3gen.flow.decoder.inference_cfg_rate
    try:
        decoder.inference_cfg_rate = 0.0
        assert snr_db(ours(model, *given, 4, guided_steps=0), upstreams(model, *given, 4)) > 100
    finally:
        decoder.inference_cfg_rate = kept


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype, floor", [(torch.float32, 110), (torch.bfloat16, 30)])
def test_attention_by_every_route_of_torch(monkeypatch, onednn, dtype, floor):
    from chatterbox_turbo.runtime.s3gen.attention import attend, hiding
    from chatterbox_turbo.runtime.s3gen.scratch import Scratch

    monkeypatch.setattr("chatterbox_turbo.runtime.s3gen.attention._kernels", lambda: ())
    monkeypatch.setattr(products, "onednn_is_faster", lambda threads: onednn)
    monkeypatch.setattr("chatterbox_turbo.runtime.s3gen.attention.SCORE_BYTES", 3 * 40 * 40 * dtype.itemsize)
    q, k, v = (torch.randn(2, 5, 40, 64, generator=torch.Generator().manual_seed(n)) for n in range(3))
    for valid in (None, torch.arange(40) < torch.tensor([[40], [17]])):
        mask = None if valid is None else valid[:, None, None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        given = attend(q.to(dtype), k.to(dtype), v.to(dtype), hiding(valid, dtype), Scratch())
        assert snr_db(given.float(), expected) > floor


def test_upstreams_own_cast_corrupts_the_prompt_and_ours_does_not(models):
    """In bf16 upstream's cast of the whole reference rounds ids above 256 to other ids."""
    model = models("english")
    reference = dict(model.conds.gen)
    ids = reference["prompt_token"].long()
    assert (ids.to(torch.bfloat16).long() != ids).any()
    before = {name: value.clone() for name, value in reference.items() if torch.is_tensor(value)}
    seen = []
    hook = model.s3gen.flow.input_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        with turbo.optimized(model, HALF if "bfloat16" in best() else {}):
            model.conds.gen = kept = dict(reference)
            speak(model)
            assert kept.keys() == reference.keys()
            assert all(torch.equal(kept[name], value) for name, value in before.items())
            assert all(kept[name].dtype == value.dtype for name, value in before.items())
    finally:
        hook.remove()
        model.conds.gen = reference
    assert torch.equal(seen[0][:, : ids.size(1)], ids)


def longer(reference):
    """A reference of twice the length."""
    longer = {name: torch.cat([reference[name]] * 2, dim=1) for name in ("prompt_token", "prompt_feat")}
    return {**reference, **longer, "prompt_token_len": 2 * reference["prompt_token_len"]}


def best():
    from chatterbox_turbo.runtime.device.half_precision import best_format

    return best_format(torch.device("cpu"))


@needs_bf16
@pytest.mark.parametrize("family", ["english", "turbo", "vc"])
def test_half_precision_is_close_and_leaves_everything_else_alone(models, family):
    model = models(family)
    encoder, estimator = model.s3gen.flow.encoder, model.s3gen.flow.decoder.estimator
    before = {name: value.clone() for name, value in estimator.state_dict().items()}
    (comparison,) = compare(model, HALF, [request_for(model)], seeds=(0,))
    assert 15 < comparison.snr_db < 60 and comparison.watermarked
    with turbo.optimized(model, HALF):
        assert estimator.mid_blocks[0][1][0].attn1.to_q.weight.dtype == torch.bfloat16
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
        assert next(model.s3gen.flow.parameters()).dtype == torch.float32  # which S3Gen casts its voice to
    after = estimator.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("options", [{"steps": 4}, {"guided_steps": 3}, {"prompt_seconds": 1.0}])
def test_knobs_change_the_sound_and_ask_for_lossy(models, options):
    model = models("english")
    with pytest.raises(InvalidConfigError, match="lossy"):
        turbo.apply(model, {"flow": options})
    reference = model.conds
    model.conds = type(reference)(reference.t3, longer(reference.gen))
    try:
        (comparison,) = compare(model, {"fidelity": "lossy", "flow": options}, [request_for(model)], seeds=(0,))
    finally:
        model.conds = reference
    assert comparison.token_agreement == 1.0 and comparison.snr_db < 60 and comparison.watermarked
    with turbo.optimized(model, {"fidelity": "lossy", "flow": options}):
        (value,) = options.values()
        assert f"{value:g} " in model.turbo.plan.step("flow").reason


def test_guided_steps_of_a_model_without_guidance_are_refused(models):
    with pytest.raises(UnavailablePassError, match="works without guidance"):
        turbo.apply(models("turbo"), {"fidelity": "lossy", "flow": {"enabled": True, "guided_steps": 1}})


def test_a_model_of_two_steps_takes_no_more(models):
    """Mean flow is trained to take its own few; a preset that takes half of the others' ten would slow it down."""
    model, config = models("turbo"), {"fidelity": "lossy", "flow": {"steps": 4}}
    (comparison,) = compare(model, config, [request_for(model)], seeds=(0,))
    assert comparison.snr_db > 60
    with turbo.optimized(model, config):
        assert "at most the model's own" in model.turbo.plan.step("flow").reason


def test_half_precision_needs_the_solver():
    with pytest.raises(InvalidConfigError, match="enabled is false"):
        turbo.OptimizationConfig(fidelity="lossy", precision={"flow": "auto"}, flow={"enabled": False})


def test_weights_cast_after_apply_are_read_anew(models):
    model = models("english")
    estimator = model.s3gen.flow.decoder.estimator
    with turbo.optimized(model, {"flow": {"enabled": True}}):
        expected = speak(model)
        estimator.double().float()  # new storage, the same values
        assert snr_db(speak(model), expected) > 100


def test_the_next_call_after_an_interrupt_is_right(models, monkeypatch):
    model = models("english")
    with turbo.optimized(model, {"flow": {"enabled": True}}):
        expected = speak(model)
        with monkeypatch.context() as patch:

            def interrupt(*args, **options):
                raise KeyboardInterrupt

            patch.setattr("chatterbox_turbo.runtime.s3gen.flow_estimator.attend", interrupt)
            with pytest.raises(KeyboardInterrupt):
                speak(model)
        assert torch.equal(speak(model), expected)
