"""What multiplies and resamples while a voice is encoded, and how far each is from upstream."""

from __future__ import annotations

import json

import pytest
import torch
from cases import FAMILIES, only
from recordings import EXACT, ONEDNN, differences, encode, voice_of, wav

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError, UnavailablePassError
from chatterbox_turbo.patching import Journal
from chatterbox_turbo.runtime.cpu import onednn as products
from chatterbox_turbo.runtime.cpu.measurements import CACHE_VARIABLE
from chatterbox_turbo.upstream import conditioning as upstream
from chatterbox_turbo.upstream.families import identify


@pytest.mark.parametrize("family", FAMILIES)
def test_another_order_of_summation_changes_no_token_here(kept, samples, family):
    model = kept(family)
    turbo.apply(model, EXACT)
    encode(model, wav(samples))
    expected = voice_of(model)
    turbo.apply(model, ONEDNN)
    encode(model, wav(samples))
    assert differences(voice_of(model), expected) == []


def test_products_by_onednn_are_those_of_torch_within_rounding(english):
    layers = upstream.tokenizer_layers(identify(english), Journal())
    assert len(layers) > 6
    torch.manual_seed(0)
    for layer in layers:
        x = torch.randn(2, 33, layer.in_features)
        with torch.no_grad():
            expected, ours = layer(x), products.linear_forward(layer)(x)
        scale = (x.abs() @ layer.weight.abs().t()).max()
        assert (ours - expected).abs().max() < 1e-6 * scale
    with_graph = products.linear_forward(layers[0])(torch.randn(3, layers[0].in_features))
    assert with_graph.requires_grad
    doubled = torch.nn.Linear(4, 4).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(products.linear_forward(doubled)(x), doubled(x))


def test_what_multiplies_follows_ceiling_option_and_machine(kept, monkeypatch):
    from chatterbox_turbo.passes import conditioning

    model, alone = kept("english"), only()

    def replaced(**options):
        config = {**alone, "fidelity": options.pop("fidelity", "numerical"), "conditioning": options}
        with turbo.optimized(model, config):
            step = model.turbo.plan.step("conditioning")
            layers = upstream.tokenizer_layers(identify(model), model.turbo.journal)
            return sum("forward" in vars(layer) for layer in layers), step.fidelity

    every = len(upstream.tokenizer_layers(identify(model), Journal()))
    monkeypatch.setattr(conditioning, "onednn_is_faster", lambda threads: True)
    assert replaced() == (every, "numerical")
    assert replaced(matmul="torch") == (0, "exact")
    assert replaced(fidelity="exact") == (0, "exact")
    monkeypatch.setattr(conditioning, "onednn_is_faster", lambda threads: False)
    assert replaced() == (0, "numerical")
    assert replaced(matmul="onednn") == (every, "numerical")
    assert products.onednn_is_faster.__wrapped__(1) in (True, False)
    with pytest.raises(InvalidConfigError, match="ceiling"):
        replaced(fidelity="exact", matmul="onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products.onednn_is_faster.__wrapped__(1)
    with pytest.raises(UnavailablePassError, match="built without"):
        replaced(enabled=True, matmul="onednn")


def test_which_is_faster_is_measured_once_and_kept(tmp_path, monkeypatch):
    """Where both are about as fast, processes that measured for themselves would round differently."""
    if products.onednn() is None:
        pytest.skip("this build has no oneDNN")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "deep" / "folder"))
    found = products.onednn_is_faster.__wrapped__(3)
    ((machine, kept),) = json.loads(products.products_file().read_text()).items()
    assert kept is found and "3 threads" in machine and torch.__version__ in machine
    products.products_file().write_text(json.dumps({machine: not found}))
    assert products.onednn_is_faster.__wrapped__(3) is not found, "measured again, or not read"
    products.products_file().write_text("{ broken")
    assert products.onednn_is_faster.__wrapped__(3) in (True, False)
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert products.onednn_is_faster.__wrapped__(3) in (True, False), "a folder that cannot be written"


def test_torchaudio_is_lossy_and_asked_for(kept, samples):
    model = kept("english")
    asked = {"matmul": "torch", "resampling": "torchaudio"}
    with pytest.raises(InvalidConfigError, match="lossy"):
        turbo.apply(model, {**only(), "conditioning": asked})
    turbo.apply(model, EXACT)
    encode(model, wav(samples))
    expected = voice_of(model)
    turbo.apply(model, {**only(), "fidelity": "lossy", "conditioning": asked})
    encode(model, wav(samples))
    ours = voice_of(model)
    assert "speaker_emb" in differences(ours, expected)
    assert torch.cosine_similarity(ours["speaker_emb"], expected["speaker_emb"]) > 0.99
    assert model.turbo.plan.step("conditioning").fidelity == "lossy"
    encode(model, wav(samples[::3], 8000))
    assert torch.isfinite(voice_of(model)["speaker_emb"]).all()


def test_onednn_and_blas_agree():
    if not products.onednn_is_faster(torch.get_num_threads()):
        pytest.skip("oneDNN is not faster here, or this build has none")
    x, weight, bias = torch.randn(3, 40, 64), torch.randn(96, 64), torch.randn(96)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(products.linear(x, weight, bias), expected, rtol=1e-5, atol=1e-4)
