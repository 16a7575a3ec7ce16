"""Original weights of what is cast: kept and restored to the bit, or let go; and what happens when memory runs out."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import speak
from snapshots import difference, snapshot
from test_casts import cast

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError, OriginalsDiscardedWarning, TurboError
from chatterbox_turbo.passes import Pass
from chatterbox_turbo.runtime.device import half_precision
from chatterbox_turbo.runtime.device.half_precision import Remainder, best_format
from chatterbox_turbo.upstream.parameters import Cast

pytestmark = pytest.mark.skipif(
    not best_format(torch.device("cpu"))[0], reason="this processor has no bf16 instructions"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUIET = {"progress": "off", "kernel": "torch"}
KEEP = {
    "fidelity": "lossy",
    "decoding": QUIET,
    "precision": {"t3": "bfloat16", "flow": "bfloat16", "encoder": "bfloat16"},
}
DISCARD = {**KEEP, "precision": {**KEEP["precision"], "originals": "discard"}}
EXACT = {"preset": "exact", "decoding": {"progress": "off"}}


def weights(model):
    roots = {"t3": model.t3, "s3gen": model.s3gen}
    return {f"{root}.{name}": p for root, module in roots.items() for name, p in module.named_parameters()}


def copies(model):
    return {name: p.detach().clone() for name, p in weights(model).items()}


@pytest.fixture
def own(fresh):
    """A model whose weights a test may alter; they are what they were afterwards."""
    model = fresh("english")
    before = copies(model)
    yield model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OriginalsDiscardedWarning)
        turbo.revert(model)
    for name, parameter in weights(model).items():
        parameter.data = before[name]


def reason(model):
    return model.turbo.plan.step("precision").reason


def rounded(before, after):
    """Names of the parameters that are not what they were, each of them as far away as one rounding."""
    found = [name for name, p in after.items() if not torch.equal(p, before[name])]
    for name in found:
        assert after[name].dtype == FP32 and torch.equal(after[name].to(BF16).float(), after[name])
        assert torch.all((after[name] - before[name]).abs() <= before[name].abs() * 2**-8)
    return found


def test_discarded_originals_come_back_rounded_and_everything_else_exactly(own):
    speak(own)  # upstream keeps an embedding in the voice
    before, state = copies(own), snapshot(own)
    turbo.apply(own, DISCARD)
    half = sum(p.nbytes for p in weights(own).values() if p.dtype == BF16)
    assert f"original weights given up ({half / 2**20:.1f} MiB)" in reason(own)
    samples = speak(own)
    with pytest.warns(
        OriginalsDiscardedWarning,
        match=r"T3 \(bfloat16\), flow estimator \(bfloat16\), flow encoder \(bfloat16\).*load",
    ):
        turbo.revert(own)
    found = rounded(before, copies(own))
    assert any(name.startswith("t3.") for name in found) and any(name.startswith("s3gen.") for name in found)
    changed = difference(state, snapshot(own))
    expected = {"/{} weights/{}".format(*name.rsplit(".", 1)) for name in found}
    assert set(changed) == expected
    assert torch.isfinite(speak(own)).all(), "upstream's own code"
    turbo.apply(own, KEEP)
    assert torch.equal(speak(own), samples), "rounded twice"


def test_kept_originals_are_named_with_their_bytes_and_no_warning(own):
    before = copies(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OriginalsDiscardedWarning)
        turbo.apply(own, KEEP)
        half = sum(p.nbytes for p in weights(own).values() if p.dtype == BF16)
        assert f"kept on the host ({half / 2**20:.1f} MiB)" in reason(own)
        turbo.revert(own)
    assert rounded(before, copies(own)) == []


def test_another_configuration_says_what_it_is_exact_to(own):
    turbo.apply(own, DISCARD)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OriginalsDiscardedWarning)
        turbo.apply(own, DISCARD)
    with pytest.warns(OriginalsDiscardedWarning, match="exact included"):
        turbo.apply(own, EXACT)
    assert "Every promise, exact included, is against these" in str(own.turbo.report())
    samples = speak(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OriginalsDiscardedWarning)  # told before
        turbo.revert(own)
    assert torch.equal(speak(own), samples)


def test_a_part_that_is_replaced_takes_no_rounding_along(own):
    old, new = own.t3, copy.deepcopy(own.t3)
    turbo.apply(own, DISCARD)
    own.t3 = new
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OriginalsDiscardedWarning)
            speak(own)  # applied again, without a word
        assert len(own.turbo.renewals) == 1 and "given up" in reason(own)
        assert {p.dtype for p in old.parameters()} == {FP32}
        own.t3 = old
        with pytest.warns(OriginalsDiscardedWarning, match="flow estimator"):
            turbo.apply(own, EXACT)
    finally:
        own.t3 = old


class Fails(Pass):
    name, summary = "fails", "an error at the end of apply"

    def apply(self, context):
        raise KeyError("last")


def test_a_failing_apply_has_discarded_nothing(own):
    state = snapshot(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OriginalsDiscardedWarning)
        with pytest.raises(KeyError):
            turbo.apply(own, DISCARD, passes=[Fails()])
    assert difference(state, snapshot(own)) == []
    turbo.apply(own, DISCARD)
    samples = speak(own)
    with pytest.raises(KeyError):
        turbo.apply(own, EXACT, passes=[Fails()])
    assert "given up" in reason(own) and torch.equal(speak(own), samples)


# -- memory that runs out --------------------------------------------------------------------------------------


def failing(function, at):
    """The function, whose call of that number finds no memory."""
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return function(*args)

    return call


@pytest.mark.parametrize("at", [1, 2, 9, 30])
def test_no_memory_to_cast_leaves_the_model_alone(monkeypatch, own, at):
    state = snapshot(own)
    with monkeypatch.context() as patch:
        patch.setattr(half_precision, "cast", failing(half_precision.cast, at))
        with pytest.raises(torch.OutOfMemoryError):
            turbo.apply(own, DISCARD)
    assert not hasattr(own, "turbo") and difference(state, snapshot(own)) == []


@pytest.mark.parametrize("config", [KEEP, DISCARD])
@pytest.mark.parametrize("at", [1, 9, 30])
def test_no_memory_to_restore_undoes_nothing(monkeypatch, own, config, at):
    before = copies(own)
    turbo.apply(own, config)
    samples, formats = speak(own), {name: p.dtype for name, p in weights(own).items()}
    for act in (lambda: turbo.revert(own), lambda: turbo.apply(own, EXACT)):
        with monkeypatch.context() as patch:
            patch.setattr(Cast, "_before", failing(Cast._before, at))
            with pytest.raises(TurboError, match=r"out of memory.*Nothing has been undone.*revert again"):
                act()
        assert {name: p.dtype for name, p in weights(own).items()} == formats
        assert "T3 in bfloat16" in reason(own) and torch.equal(speak(own), samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OriginalsDiscardedWarning)
        turbo.revert(own)
    assert bool(rounded(before, copies(own))) == (config is DISCARD)


def test_no_memory_to_take_a_failed_apply_back_puts_the_rest_back(monkeypatch, own):
    guards = dict(vars(own))
    monkeypatch.setattr(Cast, "_before", failing(Cast._before, 1))
    with pytest.raises(TurboError, match=r"number format of the flow encoder.*out of memory.*Load the model again"):
        turbo.apply(own, DISCARD, passes=[Fails()])
    assert vars(own) == guards


# -- parts that the app casts or moves since -------------------------------------------------------------------


@pytest.mark.parametrize("config", [KEEP, DISCARD])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_part_that_is_cast_afterwards_is_as_if_cast_alone(own, config, dtype):
    before = copies(own)
    turbo.apply(own, config)
    conds = own.conds
    try:
        cast(own, "t3", dtype)
        cast(own, "s3gen.flow.decoder.estimator", dtype)
        cast(own, "s3gen.flow.encoder", dtype)
        assert torch.isfinite(speak(own)).all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OriginalsDiscardedWarning)
            turbo.revert(own)
    finally:
        own.conds = conds
    for name, parameter in weights(own).items():
        part = name.startswith(("t3.", "s3gen.flow.decoder.estimator.", "s3gen.flow.encoder."))
        assert parameter.dtype == (dtype if part else FP32), name
        if config is KEEP and dtype != FP16:  # whose range is too small for every bf16 number
            assert torch.equal(parameter, before[name].to(parameter.dtype)), name
    own.t3.float(), own.s3gen.float()


def test_weights_that_are_loaded_in_half_precision_are_not_mixed_with_the_old_ones(own):
    turbo.apply(own, KEEP)
    name = "tfmr.layers.0.mlp.down_proj.weight"
    new = torch.randn_like(own.t3.state_dict()[name].float())
    own.t3.load_state_dict({name: new}, strict=False)
    speak(own)
    turbo.revert(own)
    assert torch.equal(own.t3.state_dict()[name], new.to(BF16).float())


def test_a_state_dict_of_meanwhile_keeps_its_values(own):
    before = {name: value.clone() for name, value in own.t3.state_dict().items()}
    turbo.apply(own, DISCARD)
    kept = own.t3.state_dict()
    with pytest.warns(OriginalsDiscardedWarning):
        turbo.revert(own)
    name = "tfmr.layers.0.mlp.down_proj.weight"
    assert kept[name].dtype == BF16 and torch.equal(kept[name].float(), own.t3.state_dict()[name])
    assert not torch.equal(before[name], own.t3.state_dict()[name])


def test_nothing_to_discard_is_a_contradiction():
    with pytest.raises(InvalidConfigError, match="nothing is cast, so there is nothing to discard"):
        turbo.OptimizationConfig(precision={"originals": "discard"})
    with pytest.raises(InvalidConfigError, match=r'"discard" but precision\.enabled is false'):
        turbo.OptimizationConfig(preset="fast", precision={"originals": "discard", "enabled": False})


def test_a_remainder_knows_its_bytes():
    half, remainder = half_precision.cast(torch.randn(6, 4), BF16)
    assert isinstance(remainder, Remainder) and remainder.nbytes == 48 == half.nbytes
