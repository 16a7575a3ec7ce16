"""What is measured beside upstream leaves upstream as it was, and compares like with like."""

from __future__ import annotations

import pytest
import torch

from chatterbox_turbo import OptimizationConfig, inspect
from chatterbox_turbo.cli.verify import promises
from chatterbox_turbo.errors import BudgetError
from chatterbox_turbo.measure.benchmark import measure
from chatterbox_turbo.measure.fidelity import sample
from chatterbox_turbo.measure.worker import Job, Worker

TORCH = {"decoding": {"progress": "off", "kernel": "torch"}}
OFF = {name: {"enabled": False} for name in ("flow", "vocoder", "conditioning", "attention", "watermark", "alignment")}
FOR_GOOD = {
    **TORCH,
    **OFF,
    "fidelity": "lossy",
    "quantization": {"t3": "int8", "backend": "torch", "strategy": "aggressive", "originals": "discard"},
}
LONG = "One two three four five six seven. " * 40
SHORT = {"decoding": {**TORCH["decoding"], "max_new_tokens": 8}}


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.t3.parameters()]


def same(model, before) -> bool:
    now = list(model.t3.parameters())
    return len(now) == len(before) and all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def test_a_benchmark_gives_upstream_its_weights_back(fresh):
    model = fresh("english")
    before = weights(model)
    result = measure(model, FOR_GOOD, {"text": "Hello."}, 3, 2, bandwidth=False, warm_up_both=False)
    assert same(model, before)
    (first, ours), (second, again) = result.pairs
    assert torch.equal(first.sample.wav, second.sample.wav) and first.bytes_per_token == second.bytes_per_token
    assert ours.bytes_per_token == again.bytes_per_token < first.bytes_per_token  # quantized all the same
    (note,) = result.notes
    assert 'quantization.originals = "host" instead of "discard"' in note and "peak memory" in note


def test_verify_gives_upstream_its_weights_back(fresh):
    model = fresh("turbo")
    before, said = weights(model), []
    config = OptimizationConfig(**FOR_GOOD)
    found = {one.name: one for one in promises(model, config, [{"text": "Hello."}], [0], note=said.append)}
    assert same(model, before) and len(said) == 1 and "originals" in said[0]
    assert found["quantization"].verdict == "measured" and found["decoding"].verdict == "kept"


def test_verify_looks_at_what_a_budget_has_chosen(fresh):
    """The passes of the rung that fits are on in the plan, not in the configuration that was asked for."""
    model = fresh("english")
    before, said = weights(model), []
    values = {
        "fidelity": "lossy",
        "decoding": {**TORCH["decoding"], "max_new_tokens": 30},
        "quantization": {"strategy": "aggressive", "backend": "torch"},
        "offload": {"mode": "idle"},  # so that a quantized T3 is the smallest
        **{name: OFF[name] for name in ("vocoder", "conditioning", "attention", "watermark", "alignment")},
    }
    with pytest.raises(BudgetError) as refused:
        inspect(model, {**values, "memory_budget": "2MB"})
    config = OptimizationConfig(**values, memory_budget=refused.value.needed["lossy"] + 1000)
    assert inspect(model, config).config.quantization.originals == "discard"
    found = {one.name: one for one in promises(model, config, [{"text": "Hello."}], [0], note=said.append)}
    assert found["quantization"].verdict == "measured" and found["quantization"].token_agreement < 1
    assert found["all together"].promise == "lossy"
    assert same(model, before) and "memory_budget" in said[0] and "originals" in said[1]


@pytest.mark.parametrize(("text", "config"), [(LONG, TORCH), (LONG[:350], SHORT)])
def test_texts_that_would_be_cut_are_said_at_once(english, text, config):
    result = measure(english, {**config, **OFF}, {"text": text}, 3, 1, bandwidth=False, warm_up_both=False)
    assert result.pairs[0][1].tokens and result.plan.step("text").status == "off"
    assert "text.enabled = false" in result.notes[0]
    whole = measure(english, {**TORCH, **OFF}, {"text": "Hello."}, 3, 1, bandwidth=False, warm_up_both=False)
    assert whole.notes == () and whole.plan.step("text").status == "on"


def test_a_row_of_the_matrix_says_a_long_text_at_once(english):
    config = OptimizationConfig(**{**SHORT, **OFF})
    worker = Worker(Job(lambda: None, lambda: english, config, {"text": LONG[:350]}, 3, "cpu"))
    assert worker.speak()["tokens"] == 8
    assert any("text.enabled = false" in note for note in worker.facts()["notes"])


def test_verify_takes_voice_conversion_with_half_precision(models):
    from chatterbox_turbo.cli.loading import request_for

    model = models("vc")
    config = OptimizationConfig(preset="fast", **{k: v for k, v in OFF.items() if k != "flow"})
    found = {one.name: one for one in promises(model, config, [request_for(model, "")], [0])}
    assert "all together" in found and found["precision"].verdict == "measured"
    assert sample(model, 0, request_for(model, "")).tokens is None
