"""The pass attention on the simulated CUDA device: torch's kernels there, and flash-attn by a stand-in."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from cases import speak
from flash_attn_stand_in import stand_in
from test_acoustic_cuda import capture_at_once, sound
from test_attention import heads

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import UnavailablePassError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.device.attention_kernels import Wanted, choose, eager, kernel_for, why_not
from chatterbox_turbo.runtime.s3gen.attention import hiding

CUDA = torch.device("cuda:0")
FLASH = Wanted("flash_attention_2")
HALF = {
    "fidelity": "lossy",
    "precision": {"t3": "bfloat16", "flow": "bfloat16"},
    "decoding": {"progress": "off"},
}


@pytest.fixture
def flash_attn(monkeypatch):
    """The stand-in in the place of flash-attn, once transformers has looked for the real one."""
    importlib.import_module("chatterbox.tts")
    module = stand_in()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.mark.parametrize(
    "wanted", [Wanted("sdpa", kernel) for kernel in ("flash", "efficient", "cudnn", "math")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_torch(simulated, wanted, dtype):
    half_only = wanted.kernel in ("flash", "cudnn") and dtype == torch.float32
    reason = why_not(wanted, dtype, CUDA, 64)
    assert ("in half precision on CUDA, and this is float32" in reason) if half_only else reason == ""
    with_positions = why_not(wanted, dtype, CUDA, 64, positions=True)
    assert bool(with_positions) == (half_only or wanted.kernel == "flash")
    if reason:
        return
    kernel, (q, k, v) = kernel_for(wanted, CUDA), (one.to(CUDA) for one in heads(dtype=dtype))
    valid = (torch.arange(40) < torch.tensor([[40], [17]])).to(CUDA)
    bias = hiding(valid, dtype)
    with simulated.machine.watching() as seen:
        given = kernel(q, k, v, kernel.hide(bias))
    assert not seen.waits
    expected = eager(*(one.cpu().float() for one in (q, k, v)), hiding(valid.cpu(), torch.float32))
    assert snr_db(given.cpu().float(), expected) > (100 if dtype == torch.float32 else 35)


def test_torchs_flash_kernel_leaves_hidden_frames_to_another(simulated):
    kernel, remark = choose(Wanted("sdpa", "flash"), torch.bfloat16, CUDA, 64)
    assert remark == "attention by sdpa (flash), by sdpa (efficient) where frames are hidden"
    q, k, v = (one.to(CUDA) for one in heads(dtype=torch.bfloat16))
    with simulated.machine.watching() as seen:
        kernel(q, k, v)
        kernel(q, k, v, hiding((torch.arange(40) < torch.tensor([[40], [9]])).to(CUDA), torch.bfloat16))
    assert seen.by_op["_scaled_dot_product_flash_attention"] == 1
    assert seen.by_op["_scaled_dot_product_efficient_attention"] == 1


def test_flash_attention_sees_whole_rows_or_rows_and_their_padding(simulated, flash_attn):
    kernel = kernel_for(FLASH, CUDA)
    q, k, v = (one.to(CUDA) for one in heads(dtype=torch.bfloat16))
    for lengths in ([40, 40], [40, 17], [1, 39]):
        valid = torch.arange(40) < torch.tensor(lengths)[:, None]
        on_device = hiding(valid.to(CUDA), torch.bfloat16)
        with simulated.machine.watching() as seen:
            given = kernel(q, k, v, kernel.hide(on_device))
        assert not seen.waits
        expected = eager(*(one.cpu().float() for one in (q, k, v)), hiding(valid, torch.float32))
        for row, length in enumerate(lengths):
            assert snr_db(given.cpu().float()[row, :, :length], expected[row, :, :length]) > 35
        assert given.isfinite().all()
    assert flash_attn.calls == [("several", (80, 3, 64), False)] * 3
    flash_attn.calls.clear()
    causal = kernel(q, k, v, causal=True)
    assert snr_db(causal.cpu().float(), eager(*(one.cpu().float() for one in (q, k, v)), causal=True)) > 35
    kernel(q, k, v, kernel.hide(None))
    assert flash_attn.calls == [("whole", (2, 40, 3, 64), True), ("whole", (2, 40, 3, 64), False)]


def test_boundaries_are_where_rows_and_their_padding_begin(simulated, flash_attn):
    valid = torch.arange(40) < torch.tensor([[40], [17], [1]])
    ends, longest = kernel_for(FLASH, CUDA).hide(hiding(valid.to(CUDA), torch.bfloat16))
    assert ends.tolist() == [0, 40, 40, 57, 80, 81, 120] and ends.dtype == torch.int32 and longest == 40


@pytest.mark.parametrize(
    "alter, width, dtype, reason",
    [
        (lambda module: None, 64, torch.float32, "float16 and bfloat16, and this is float32"),
        (lambda module: None, 60, torch.bfloat16, "multiple of 8 up to 256, these have 60"),
        (lambda module: None, 264, torch.bfloat16, "multiple of 8 up to 256, these have 264"),
        (
            lambda module: setattr(module, "__version__", "1.0.9"),
            64,
            torch.bfloat16,
            "flash-attn 1.0.9 is too old: 2.1",
        ),
        (lambda module: setattr(module, "__version__", "2.0.9"), 64, torch.bfloat16, "2.0.9 is too old"),
        (lambda module: delattr(module, "__version__"), 64, torch.bfloat16, "of no version is too old"),
        (lambda module: delattr(module, "flash_attn_varlen_func"), 64, torch.bfloat16, "ImportError"),
        (lambda module: setattr(module, "flash_attn_func", lambda q, k, v: q), 64, torch.bfloat16, "softmax_scale"),
        (
            lambda module: setattr(module, "flash_attn_func", lambda q, k, v, **options: q),
            64,
            torch.bfloat16,
            "differs from the definition",
        ),
        (lambda module: None, 64, torch.bfloat16, ""),
        (lambda module: setattr(module, "__version__", "2.8.3.post1"), 64, torch.float16, ""),
    ],
)
def test_a_flash_attention_that_does_not_fit_is_told(simulated, flash_attn, alter, width, dtype, reason):
    alter(flash_attn)
    found = why_not(FLASH, dtype, CUDA, width)
    assert reason in found and bool(reason) == bool(found)


def test_a_flash_attention_that_is_not_there_or_does_not_load(simulated, monkeypatch, tmp_path):
    assert "flash-attn is not installed" in why_not(FLASH, torch.bfloat16, CUDA, 64)
    (tmp_path / "flash_attn.py").write_text("import flash_attn_2_cuda")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = why_not(FLASH, torch.bfloat16, CUDA, 64)
    assert found.startswith("flash-attn does not load: ModuleNotFoundError") and "flash_attn_2_cuda" in found
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert "undefined symbol" in why_not(FLASH, torch.bfloat16, CUDA, 64)


@pytest.mark.parametrize("wanted", [FLASH, Wanted("sdpa", "flash"), Wanted("sdpa", "cudnn")], ids=str)
def test_cards_before_ampere(simulated, flash_attn, monkeypatch, wanted):
    monkeypatch.setattr(simulated.machine, "capability", (7, 5))
    assert "capability 8.0, this GPU has 7.5" in why_not(wanted, torch.float16, CUDA, 64)
    assert why_not(Wanted("sdpa", "efficient"), torch.float16, CUDA, 64) == ""


def test_a_model_speaks_by_it_in_graphs(simulated, flash_attn):
    machine, model = simulated.machine, simulated.get("english")
    section = {"prefill": "flash_attention_2", "flow": "flash_attention_2", "encoder": "flash_attention_2"}
    turbo.apply(model, HALF)
    usual = sound(model, 60).cpu()
    turbo.apply(model, {**HALF, "attention": section})
    step = model.turbo.plan.step("attention")
    assert (step.status, step.fidelity) == ("on", "lossy")
    assert step.reason.startswith("prefill by flash_attention_2; flow by flash_attention_2; encoder not by ")
    report = str(model.turbo.report())
    assert "prefill's attention by flash_attention_2" in report and "flow's attention by flash_attention_2" in report
    flash_attn.calls.clear()
    plain = sound(model, 60).cpu()
    assert {call[0] for call in flash_attn.calls} == {"whole"}
    # 25 tokens of the voice and 60, twice as many frames, with guidance
    assert {call[1][:2] for call in flash_attn.calls} == {(2, 170)}
    flash_attn.calls.clear()
    runner, _ = capture_at_once(model)
    with machine.watching() as seen:
        padded = sound(model, 60).cpu()
    assert seen.counts["captures"] == 2 and runner.captured and not runner.fallbacks
    assert {call[0] for call in flash_attn.calls} == {"several"}
    for other in (plain, padded):
        assert snr_db(other, usual) > 20  # whole rows to the bit: the stand-in computes as the simulated device does
    assert snr_db(padded, plain) > 25
    flash_attn.calls.clear()
    speak(model)
    assert [call for call in flash_attn.calls if call[2]] and all(
        call[0] == "whole" for call in flash_attn.calls if call[2]
    )


def test_a_batch_pads_and_attends_by_it(simulated, flash_attn):
    model = simulated.get("english")
    turbo.apply(model, {**HALF, "attention": {"flow": "flash_attention_2", "prefill": "flash_attention_2"}})
    flash_attn.calls.clear()
    wavs = model.turbo.batch([{"text": "One, two, three.", "seed": 1}, {"text": "Four.", "seed": 2}])
    assert all(wav.isfinite().all() for wav in wavs) and len(wavs) == 2
    rows = [call[1][0] for call in flash_attn.calls if call[2]]
    assert rows == [4] * len(rows) and rows, "both requests in one prefill, each with guidance"


def test_full_precision_keeps_its_own_choice_or_is_refused(simulated, flash_attn):
    model = simulated.get("english")
    config = {"fidelity": "lossy", "decoding": {"progress": "off"}, "attention": {"flow": "flash_attention_2"}}
    step = turbo.inspect(model, config).step("attention")
    assert step.status == "skipped" and "this is float32 (see precision)" in step.reason
    with pytest.raises(UnavailablePassError, match="flow: flash-attn computes in float16 and bfloat16"):
        turbo.apply(model, {**config, "attention": {"flow": "flash_attention_2", "enabled": True}})
    assert not hasattr(model, "turbo")
