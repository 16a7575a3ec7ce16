"""Number formats: refused where they would do nothing, scoped or undone to the bit where they do something."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from cases import TEXT, onlooker, speak
from snapshots import difference, snapshot

import chatterbox_turbo as turbo
from chatterbox_turbo.config import PRECISION_PARTS
from chatterbox_turbo.errors import InvalidConfigError, UnavailablePassError
from chatterbox_turbo.measure.benchmark import t3_bytes
from chatterbox_turbo.measure.divergence import token_divergence
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.passes.base import Context
from chatterbox_turbo.passes.precision import PrecisionPass
from chatterbox_turbo.runtime.device import half_precision
from chatterbox_turbo.runtime.device.half_precision import best_format, cast
from chatterbox_turbo.runtime.device.tf32 import allowed, tf32
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.stages import stages

LOSSY = {"fidelity": "lossy", "decoding": {"progress": "off"}}


def test_on_a_cpu_it_is_skipped_with_the_reason(english):
    step = turbo.inspect(english, {**LOSSY, "precision": {"tf32": True}}).step("precision")
    assert (step.status, step.fidelity) == ("skipped", "lossy") and "CUDA" in step.reason
    with pytest.raises(UnavailablePassError, match="CUDA"):
        turbo.apply(english, {**LOSSY, "precision": {"tf32": True, "enabled": True}})


def test_the_switches_are_put_back_also_after_an_exception():
    before = allowed()
    assert before != (True, True)
    with pytest.raises(KeyError), tf32():
        assert allowed() == (True, True)
        raise KeyError
    assert allowed() == before


def test_overlapping_scopes_of_two_threads_restore_the_state_before_both():
    before, inside, leave = allowed(), threading.Event(), threading.Event()

    def other():
        with tf32():
            inside.set()
            leave.wait(timeout=10)

    thread = threading.Thread(target=other)
    with tf32():
        thread.start()
        inside.wait(timeout=10)
    assert allowed() == (True, True), "the first to leave took TF32 from the other"
    leave.set()
    thread.join()
    assert allowed() == before


@pytest.mark.gpu
def test_on_a_gpu_it_is_on_while_generating_only():
    from chatterbox_turbo import synthetic

    model = synthetic.build("english", "tiny", device="cuda")
    seen = []
    model.s3gen.flow.encoder.register_forward_pre_hook(onlooker(lambda *_: seen.append(allowed())))
    before = allowed()
    with turbo.optimized(model, {**LOSSY, "precision": {"tf32": True, "enabled": True}}):
        speak(model)
        assert allowed() == before
    assert seen == [(True, True)]


# -- half precision of T3 --------------------------------------------------------------------------------------

HALF = {"fidelity": "lossy", "decoding": {"progress": "off"}, "precision": {"t3": "bfloat16"}}
needs_bf16 = pytest.mark.skipif(
    not best_format(torch.device("cpu"))[0], reason="this processor has no bf16 instructions"
)


@needs_bf16
@pytest.mark.parametrize(
    "model, kernel",
    [("english", "numba"), ("english", "torch"), ("multilingual", "numba"), ("turbo", "torch")],
    indirect=["model"],
)
def test_weights_are_half_the_bytes_and_restored_to_the_bit(model, kernel):
    before = {name: p.detach().clone() for name, p in model.t3.named_parameters()}
    size = t3_bytes(identify(model))
    turbo.apply(model, {**HALF, "decoding": {"progress": "off", "kernel": kernel}})
    assert "T3 in bfloat16" in model.turbo.plan.step("precision").reason
    assert t3_bytes(identify(model)) < 0.51 * size
    assert torch.isfinite(speak(model)).all()
    turbo.revert(model)
    for name, p in model.t3.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name]), name


@needs_bf16
@pytest.mark.parametrize("model", ["english", "turbo"], indirect=True)
def test_divergence_from_fp32_is_small_and_not_nothing(model):
    found = token_divergence(model, HALF, {"text": TEXT})
    assert 1e-9 < found.mean < 1e-2 and found.agreement > 0.8 and found.in_top_5 > 0.95 and found.steps > 5
    same = token_divergence(model, {"decoding": {"progress": "off", "kernel": "torch"}}, {"text": TEXT})
    assert same.mean < 1e-9 and same.agreement == 1.0


@needs_bf16
def test_the_preset_fast_uses_it_and_auto_does_not(english):
    assert turbo.inspect(english, "fast").step("precision").status == "on"
    assert turbo.inspect(english, "auto").step("precision").status == "off"
    fp32 = {"preset": "fast", "precision": dict.fromkeys(PRECISION_PARTS, "float32")}
    assert turbo.inspect(english, fp32).step("precision").status == "off"


def test_casts_are_undone_to_the_bit_also_for_ties_and_signs():
    bits = torch.cat(
        [
            torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0)),
            torch.arange(-70_000, 70_000) * 0x8000,  # ties, odd and even
            torch.tensor([0, -(2**31), 0x7F800000, 0x00008000, 0x00007FFF, 0x3F808000, 0x3F818000]),
        ]
    ).to(torch.int32)
    values = bits.view(torch.float32)
    half, restore = cast(values, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(restore(half).view(torch.int32), bits)
    finite = values.isfinite() & (values.abs() < 3e38)
    rounded = values[finite].bfloat16().double()
    error = (half[finite].double() - values[finite].double()).abs()
    assert torch.all(error <= (rounded - values[finite].double()).abs()), "further away than round-to-nearest"
    half, restore = cast(values, torch.float16)
    assert half.dtype == torch.float16 and torch.equal(restore(half).view(torch.int32), bits)


@pytest.mark.parametrize(
    "capability, asked, wanted, said",
    [
        ((8, 0), "auto", "bfloat16", "capability 8.0"),
        ((9, 0), "float16", "", "bfloat16 is as fast here"),
        ((7, 5), "auto", "float16", "capability 7.5"),
        ((7, 5), "bfloat16", "", "emulated"),
        ((6, 1), "auto", "", "needs capability 7.0"),
    ],
)
def test_every_card_gets_the_format_that_it_is_good_at(monkeypatch, models, capability, asked, wanted, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    parts = replace(identify(models("english")))
    config = turbo.OptimizationConfig(fidelity="lossy", precision={"t3": asked})

    class OnCuda(type(parts)):
        device = torch.device("cuda")

    context = Context(OnCuda(**vars(parts)), config, planned=["decoding", "flow", "vocoder"])
    reason = PrecisionPass().check(context)
    assert (said in reason) if not wanted else reason == ""
    assert not wanted or PrecisionPass()._format(context, "t3") == (wanted, said)


def test_a_processor_without_bf16_is_told(monkeypatch, english):
    monkeypatch.setattr(half_precision, "cpu_flags", set)
    step = turbo.inspect(english, HALF).step("precision")
    assert step.status == "skipped" and "AVX-512-BF16 or AMX" in step.reason
    with pytest.raises(UnavailablePassError, match="AVX-512-BF16"):
        turbo.apply(english, {**HALF, "precision": {"t3": "auto", "enabled": True}})


@pytest.mark.skipif(not half_precision.CPUINFO.exists(), reason="not Linux")
def test_where_linux_does_not_tell_them_the_instruction_sets_are_the_same(monkeypatch, tmp_path):
    told = half_precision.cpu_flags()
    monkeypatch.setattr(half_precision, "CPUINFO", tmp_path / "cpuinfo")
    assert half_precision.cpu_flags() == told


@needs_bf16
def test_half_precision_beside_tf32_that_cannot_run_says_both(english):
    turbo.apply(english, {**HALF, "precision": {"t3": "auto", "tf32": True}})
    reason = english.turbo.plan.step("precision").reason
    assert "T3 in bfloat16" in reason and "not tf32: TF32 needs a CUDA device" in reason


@pytest.mark.parametrize("decoding", [{"enabled": False}, {"backbone": "upstream"}])
def test_half_precision_without_the_static_backbone_is_a_contradiction(decoding):
    with pytest.raises(InvalidConfigError, match="only the static backbone reads weights in half precision"):
        turbo.OptimizationConfig(fidelity="lossy", precision={"t3": "auto"}, decoding=decoding)


# -- half precision of the encoder and the vocoder -------------------------------------------------------------

ACOUSTIC = {"encoder": 45.0, "vocoder": 35.0}  # dB, of mel frames and of samples


def acoustic_half(model):
    """Mel frames, and samples of the same frames whoever has made them."""
    parts = identify(model)
    own, frames = stages(parts), torch.randn(1, 80, 100, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.manual_seed(0)
        mel = own.frames(torch.arange(60) % 50, own.voice_reference(parts.voice))
        torch.manual_seed(0)
        return {"encoder": mel.clone(), "vocoder": own.vocode(frames).clone()}


@needs_bf16
@pytest.mark.parametrize("model", ["english", "turbo", "vc"], indirect=True)
@pytest.mark.parametrize("part", ACOUSTIC)
def test_encoder_and_vocoder_in_half_precision_are_near_and_not_the_same(model, part):
    turbo.apply(model, LOSSY)
    right = acoustic_half(model)
    turbo.revert(model)
    before = snapshot(model)
    turbo.apply(model, {**LOSSY, "precision": {part: "auto"}})
    assert "in bfloat16" in model.turbo.plan.step("precision").reason
    found = acoustic_half(model)
    turbo.revert(model)
    assert difference(before, snapshot(model)) == []
    assert ACOUSTIC[part] < snr_db(found[part], right[part]) < 90
    (other,) = set(ACOUSTIC) - {part}
    if other == "vocoder":
        assert torch.equal(right[other], found[other]), "the other part is not in half precision"


@needs_bf16
def test_the_vocoders_own_weights_stay_as_they_are(english):
    before = {name: (p.data_ptr(), p.dtype) for name, p in english.s3gen.mel2wav.named_parameters()}
    turbo.apply(english, {**LOSSY, "precision": {"vocoder": "bfloat16"}})
    speak(english)
    assert {name: (p.data_ptr(), p.dtype) for name, p in english.s3gen.mel2wav.named_parameters()} == before
    assert "residual blocks in bfloat16" in str(english.turbo.report())


@needs_bf16
def test_weights_of_the_vocoder_that_are_loaded_later_are_used(english):
    turbo.apply(english, {**LOSSY, "precision": {"vocoder": "bfloat16"}})
    first = acoustic_half(english)["vocoder"]
    state = {name: value.clone() for name, value in english.s3gen.mel2wav.state_dict().items()}
    try:
        other = {name: value * 0.5 if "resblocks" in name else value for name, value in state.items()}
        english.s3gen.mel2wav.load_state_dict(other)
        assert not torch.equal(acoustic_half(english)["vocoder"], first)
    finally:
        english.s3gen.mel2wav.load_state_dict(state)
    assert torch.equal(acoustic_half(english)["vocoder"], first)


@needs_bf16
def test_a_vocoder_that_upstream_computes_stays_in_float32(english):
    turbo.apply(english, {**LOSSY, "precision": {"encoder": "auto", "vocoder": "auto"}, "vocoder": {"enabled": False}})
    reason = english.turbo.plan.step("precision").reason
    assert "flow encoder in bfloat16" in reason
    assert "not vocoder: vocoder's residual blocks in half precision needs the pass vocoder" in reason
    assert torch.isfinite(speak(english)).all()


def test_half_precision_of_an_encoder_that_upstream_computes_is_a_contradiction():
    with pytest.raises(InvalidConfigError, match=r"precision\.encoder is .*flow\.enabled is false"):
        turbo.OptimizationConfig(fidelity="lossy", precision={"encoder": "auto"}, flow={"enabled": False})
