"""T3's matrices as small integers: what rounding costs, which layers stay, and that everything else goes on working."""

from __future__ import annotations

import pytest
import torch
from cases import TEXT, speak
from snapshots import difference, snapshot
from test_casts import cast

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError, OriginalsDiscardedWarning, UnavailablePassError
from chatterbox_turbo.measure.benchmark import t3_bytes
from chatterbox_turbo.measure.divergence import token_divergence
from chatterbox_turbo.passes.quantization import STRATEGIES
from chatterbox_turbo.runtime.device.quantized import SCHEMES, QuantizedLinear, pack, stacked
from chatterbox_turbo.runtime.device.rounding import quantize
from chatterbox_turbo.upstream import t3 as upstream_t3
from chatterbox_turbo.upstream import t3_weights
from chatterbox_turbo.upstream.families import identify

FLOORS = {"int8": 43.0, "int4": 21.0, "nf4": 20.5, "fp4": 18.0}  # dB of a matrix of normal numbers
QUIET = {"progress": "off", "kernel": "torch"}


def config(scheme="int8", strategy="aggressive", backend="torch", **more):
    section = {"t3": scheme, "strategy": strategy, "backend": backend, **more.pop("quantization", {})}
    return {"fidelity": "lossy", "quantization": section, "decoding": QUIET, **more}


def weights(rows=96, columns=512):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def snr_db(given, expected):
    return float(10 * torch.log10(expected.square().sum() / (given - expected).square().sum()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_costs_what_its_bits_cost(scheme):
    weight = weights()
    matrix = quantize(weight, scheme)
    bits = 8 * matrix.nbytes / weight.numel()
    assert FLOORS[scheme] < snr_db(matrix.dequantize(), weight) < FLOORS[scheme] + 3
    assert matrix.shape == weight.shape and bits == (8.125 if scheme == "int8" else 4.5)


def test_fitted_grids_err_less_than_those_that_span_a_group():
    weight = weights()
    spanned, fitted = (quantize(weight, "int4", fit).dequantize() for fit in (False, True))
    assert snr_db(fitted, weight) > snr_db(spanned, weight) + 0.3
    groups = [(each - weight).unflatten(1, (-1, 64)).square().sum(-1) for each in (spanned, fitted)]
    assert (groups[1] <= groups[0] * (1 + 1e-5)).all(), "no group is worse for it"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weight", [torch.zeros(4, 128), torch.full((4, 128), 3.0), torch.eye(128)], ids=str)
def test_rounding_of_odd_groups(scheme, weight):
    given = quantize(weight, scheme).dequantize()
    assert torch.isfinite(given).all() and (given - weight).abs().max() <= 0.02 * weight.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_packed_without_loss(scheme):
    form = SCHEMES[scheme]
    codes = torch.randint(0, 16, (6, 256), generator=torch.Generator().manual_seed(2))
    matrix = quantize(weights(6, 256), scheme)
    scales = torch.ones_like(matrix.scales)
    zeros = None if matrix.zeros is None else torch.zeros_like(matrix.zeros)
    unpacked = type(matrix)(scheme, pack(codes, form), scales, zeros).dequantize()
    assert torch.equal(unpacked, codes.float() if form.table is None else form.table()[codes])


def test_rows_of_several_matrices_are_those_of_each():
    first, second = quantize(weights(8), "int4"), quantize(weights(16) + 0.01, "int4")
    both = stacked([first, second])
    assert torch.equal(both.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    assert torch.equal(both.rows(8, 24).dequantize(), second.dequantize())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_casts_and_moves_of_a_layer_leave_its_integers_and_scales(scheme):
    layer = QuantizedLinear(quantize(weights(), scheme), bias=torch.nn.Parameter(torch.ones(96)))
    x, expected = torch.ones(2, 512), layer(torch.ones(2, 512))
    for change in (layer.half, layer.bfloat16, layer.double, layer.float):
        change()
        assert layer.codes.dtype in (torch.int8, torch.uint8) and torch.equal(layer(x), expected)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert snr_db(layer.weight, weights()) > FLOORS[scheme]
    assert layer.to("meta").scales.is_meta and set(layer.state_dict()) >= {"codes", "scales", "bias"}


def test_a_matrix_whose_inputs_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="96 inputs are no multiple of 128"):
        quantize(weights(8, 96), "int4")


@pytest.mark.parametrize(
    "model, scheme, backbone",
    [("english", "int4", "upstream"), ("english", "nf4", "static"), ("multilingual", "int8", "static"),
     ("turbo", "int8", "upstream"), ("turbo", "int4", "static")],
    indirect=["model"],
)  # fmt: skip
def test_a_quantized_model_speaks_and_comes_back(model, scheme, backbone):
    theirs, before, size = speak(model), snapshot(model), t3_bytes(identify(model))
    turbo.apply(model, config(scheme, decoding={**QUIET, "backbone": backbone}))
    assert f"T3 in {scheme}" in model.turbo.plan.step("quantization").reason
    codes = sum(layer.codes.nbytes for layer in model.t3.modules() if isinstance(layer, QuantizedLinear))
    head = sum(p.nbytes for p in upstream_t3.head(model.t3).parameters())
    assert 0 < codes < t3_bytes(identify(model)) - head < 0.5 * (size - head), "tiny models have large heads"
    given = speak(model)
    assert torch.isfinite(given).all() and not torch.equal(given, theirs)
    turbo.revert(model)
    assert [path for path in difference(before, snapshot(model)) if "patched_model" not in path] == []
    assert torch.equal(speak(model), theirs)


@pytest.mark.parametrize("model", ["multilingual"], indirect=True)  # which has more than two blocks
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_leaves_the_layers_that_it_names(model, strategy):
    turbo.apply(model, config(strategy=strategy))
    wanted, layers = STRATEGIES[strategy], len(model.t3.tfmr.layers)
    for index, kind, sites in t3_weights.products(model.t3):
        inside = wanted.ends <= index < layers - wanted.ends and kind in wanted.kinds
        assert {isinstance(getattr(owner, name), QuantizedLinear) for owner, name in sites} == {inside}, (index, kind)
    assert not [
        name for name, m in model.t3.named_modules() if isinstance(m, QuantizedLinear) and not name.startswith("tfmr.")
    ]


@pytest.mark.parametrize("model", ["english"], indirect=True)
def test_the_divergence_of_logits_grows_as_bits_fall(model):
    eight, four = (token_divergence(model, config(scheme), {"text": TEXT}) for scheme in ("int8", "int4"))
    assert 1e-9 < eight.mean < 5e-3 and eight.in_top_5 == 1.0 and eight.agreement > 0.8
    assert eight.mean < four.mean < 0.5


@pytest.mark.parametrize("model", ["english"], indirect=True)
def test_batches_of_a_quantized_model_are_each_as_alone(model):
    turbo.apply(model, config("int4"))
    items = [{"text": text, "seed": seed} for seed, text in enumerate(("One.", "Two of them."))]
    first, _ = model.turbo.batch(items)
    (alone,) = model.turbo.batch(items[:1])
    assert first.shape == alone.shape and snr_db(first, alone) > 60


@pytest.mark.parametrize("model", ["english"], indirect=True)
def test_layers_that_an_app_casts_or_replaces_are_read_again(model):
    turbo.apply(model, config())
    theirs = speak(model)
    layer = model.t3.tfmr.layers[0].mlp.down_proj
    other = QuantizedLinear(quantize(torch.zeros(layer.out_features, layer.in_features), "int8"))
    model.t3.tfmr.layers[0].mlp.down_proj = other
    with pytest.raises(turbo.TurboError, match="down_proj"):
        turbo.revert(model)  # the app's layer is in the way
    model.t3.tfmr.layers[0].mlp.down_proj = layer
    assert torch.equal(speak(model), theirs)


@pytest.mark.parametrize("model", ["english"], indirect=True)
def test_what_is_quantized_already_is_told(model):
    site = model.t3.tfmr.layers[0].mlp
    own = site.down_proj
    site.down_proj = QuantizedLinear(quantize(own.weight, "int8"))
    try:
        with pytest.raises(UnavailablePassError, match=r"quantized already \(int8\)"):
            turbo.apply(model, config("int4", quantization={"enabled": True}))
        turbo.apply(model, {"decoding": QUIET})
        assert "float32 with int8" in model.turbo.plan.step("decoding").reason and torch.isfinite(speak(model)).all()
        turbo.revert(model)
        site.gate_proj, gate = QuantizedLinear(quantize(site.gate_proj.weight, "int8")), site.gate_proj
        turbo.apply(model, {"decoding": QUIET})
        assert "several ways: int8, none" in model.turbo.plan.step("decoding").reason
        turbo.revert(model)
        site.gate_proj = gate
    finally:
        turbo.revert(model)
        site.down_proj = own


@pytest.mark.parametrize("model", ["english"], indirect=True)
@pytest.mark.parametrize(
    "section, reason",
    [
        ({"t3": "nf4"}, "compute int8 and int4, not nf4"),
        ({"t3": "nf4", "backend": "native"}, "compute int8 and int4, not nf4"),
        ({"t3": "int8", "strategy": "conservative"}, "leaves every layer"),
    ],
)
def test_what_cannot_be_had_is_left_out_with_the_reason_or_refused(model, section, reason):
    asked = {"fidelity": "lossy", "decoding": QUIET, "quantization": section}
    assert reason in turbo.inspect(model, asked).step("quantization").reason
    with pytest.raises(UnavailablePassError, match=reason):
        turbo.apply(model, {**asked, "quantization": {**section, "enabled": True}})


@pytest.mark.parametrize("model", ["multilingual"], indirect=True)
def test_the_preset_for_little_memory_plans_what_this_device_is_good_at(model):
    plan = turbo.inspect(model, "low_vram")
    assert {"quantization", "offload"} <= set(plan.running)
    assert plan.config.quantization.originals == plan.config.precision.originals == "discard"


def test_it_is_lossy_and_says_so():
    with pytest.raises(InvalidConfigError, match="quantization is lossy"):
        turbo.OptimizationConfig(quantization={"t3": "int8"})
    with pytest.raises(InvalidConfigError, match="t3 is none"):
        turbo.OptimizationConfig(fidelity="lossy", quantization={"enabled": True})


def test_on_a_simulated_gpu_originals_go_to_the_host_and_steps_are_captured(simulated):
    model = simulated.get("english")
    before = {name: p.device for name, p in model.t3.named_parameters()}
    turbo.apply(model, config("auto", backend="torch", decoding={"progress": "off"}))
    assert "T3 in nf4" in model.turbo.plan.step("quantization").reason
    layers = [m for m in model.t3.modules() if isinstance(m, QuantizedLinear)]
    assert layers and all(layer.codes.is_cuda and layer.scales.is_cuda for layer in layers)
    assert torch.isfinite(speak(model)).all()
    assert model.turbo.token_model.backbone.captured
    turbo.revert(model)
    assert {name: p.device for name, p in model.t3.named_parameters()} == before


@pytest.mark.parametrize("model", ["english"], indirect=True)
def test_another_configuration_quantizes_the_original_weights_again(model):
    turbo.apply(model, config("int4"))
    turbo.apply(model, config("int8"))
    again = speak(model)
    turbo.revert(model)
    turbo.apply(model, config("int8"))
    assert torch.equal(speak(model), again)


def test_layers_that_were_let_go_stay_quantized(fresh):
    model = fresh("english")
    theirs, size = speak(model), t3_bytes(identify(model))
    discard = config("int4", quantization={"originals": "discard"})
    turbo.apply(model, discard)
    assert "given up" in model.turbo.plan.step("quantization").reason
    given = speak(model)
    turbo.apply(model, discard)
    assert torch.equal(speak(model), given) and "int4" in model.turbo.plan.step("quantization").reason
    with pytest.warns(OriginalsDiscardedWarning, match=r"T3 \(int4\)"):
        turbo.revert(model)
    head = upstream_t3.head(model.t3).weight.nbytes
    assert t3_bytes(identify(model)) - head < 0.5 * (size - head)
    assert not torch.equal(speak(model), theirs) and torch.isfinite(speak(model)).all(), "upstream's own code"


@pytest.fixture
def uncast(fresh):
    """``uncast(family)``: a model of this module's own, whose T3 and voice are what they were afterwards."""
    before = {}

    def get(family):
        model = fresh(family)
        before[model] = model.conds, {name: p.detach().clone() for name, p in model.t3.named_parameters()}
        return model, before[model][1]

    yield get
    for model, (voice, weights) in before.items():
        turbo.revert(model)
        model.conds = voice
        for name, parameter in model.t3.named_parameters():
            parameter.data = weights[name]


@pytest.mark.parametrize("family, strategy", [("multilingual", "balanced"), ("turbo", "aggressive")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heard", [False, True])
def test_original_layers_are_cast_as_t3_has_been_since(uncast, family, strategy, dtype, heard):
    model, before = uncast(family)
    turbo.apply(model, config("int8", strategy))
    cast(model, "t3", dtype)
    if heard:  # the configuration is applied again
        assert torch.isfinite(speak(model)).all()
    turbo.revert(model)
    for name, parameter in model.t3.named_parameters():
        assert torch.equal(parameter, before[name].to(dtype)) and parameter.dtype == dtype, name
    assert torch.isfinite(speak(model)).all(), "upstream's own code"


def test_a_cast_that_was_taken_back_leaves_the_original_layers_alone(uncast):
    model, before = uncast("multilingual")
    replaced = [f"tfmr.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    turbo.apply(model, config("int8"))
    model.t3.bfloat16()
    model.t3.float()
    turbo.revert(model)
    now = dict(model.t3.named_parameters())
    assert {p.dtype for p in now.values()} == {torch.float32}
    assert all(torch.equal(now[name], before[name]) for name in replaced)


@pytest.mark.parametrize("family", ["multilingual", "turbo"])
def test_original_layers_follow_t3_to_another_simulated_gpu(simulated, family):
    model = simulated.get(family)
    turbo.apply(model, config("int8"))
    try:
        model.t3.to("cuda:1")
        turbo.revert(model)
        assert {str(p.device) for p in model.t3.parameters()} == {"cuda:1"}
    finally:
        turbo.revert(model)
        model.t3.to("cuda:0")
    assert torch.isfinite(speak(model)).all()
