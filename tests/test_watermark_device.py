"""The watermark computed on the model's device: PerTh's own within rounding, and PerTh's network left alone."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from cases import CASES, only, request_for, speak
from snapshots import difference, snapshot

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError, UnavailablePassError
from chatterbox_turbo.measure.fidelity import compare, snr_db
from chatterbox_turbo.runtime.device.devices import download, upload
from chatterbox_turbo.runtime.voice.reference_audio import resample, resample_on
from chatterbox_turbo.runtime.voice.resampling import Resampler

ON_MODEL = {"decoding": {"progress": "off"}, "watermark": {"device": "model"}}
ALONE = only(next(case for case in CASES if str(case) == "watermark-model"))
RATE = 24000


def ratio(ours, reference):
    """SNR in dB of samples (n,)."""
    return snr_db(torch.from_numpy(ours), torch.from_numpy(reference))


def confidence(watermarker, samples):
    return float(watermarker.get_watermark(samples, sample_rate=RATE, round=False).mean())


def outcome(apply, signal):
    """What a call returns, or the kind and message of what it raises."""
    try:
        return apply(signal, sample_rate=RATE)
    except Exception as error:
        return type(error), str(error)


@pytest.fixture
def perth(english):
    """The real watermarker of a model that marks on its device."""
    real = english.watermarker
    turbo.apply(english, ON_MODEL)
    return real


@pytest.fixture(scope="module")
def noise():
    return (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)


@pytest.fixture
def encoders():
    """``encoders()``: instances of PerTh's encoder that are alive."""
    from perth.perth_net.perth_net_implicit.model.encoder import Encoder

    def alive():
        gc.collect()
        return sum(type(thing) is Encoder for thing in gc.get_objects())

    return alive


SIGNALS = {
    "speech": lambda speech, noise: speech,
    "noise": lambda speech, noise: noise,
    "quiet": lambda speech, noise: speech / 10000,
    "0.1 s": lambda speech, noise: speech[RATE : RATE + 2400],
    "odd": lambda speech, noise: speech[:30001],
    "odd too": lambda speech, noise: noise[:30002],
    "backwards": lambda speech, noise: speech[::-1],
    "float64": lambda speech, noise: speech.astype(np.float64),
}


@pytest.mark.parametrize("signal", SIGNALS.values(), ids=SIGNALS)
def test_the_watermark_is_perths(english, perth, samples, noise, signal):
    signal = signal(samples[: 3 * RATE], noise).view()
    signal.flags.writeable = False
    with torch.no_grad():
        expected = perth.apply_watermark(signal, sample_rate=RATE)
    marked = english.watermarker.apply_watermark(signal, sample_rate=RATE)
    assert marked.shape == expected.shape and marked.dtype == np.float32 and marked.flags.writeable
    assert ratio(marked, expected) > 110 > 40 > ratio(signal[: len(expected)].astype(np.float32), expected)
    assert perth.get_watermark(marked, sample_rate=RATE).mean() == 1.0
    assert abs(confidence(perth, marked) - confidence(perth, expected)) < 0.02


def test_what_a_model_says_is_marked_as_by_perth(models):
    """All families: test_passes.py, by the promise of 60 dB."""
    model = models("turbo")
    for comparison in compare(model, ALONE, [request_for(model)], seeds=(0, 1)):
        assert comparison.watermarked and 100 < comparison.snr_db < float("inf")


def test_silence_stays_silence(english, perth):
    silence = np.zeros(RATE, dtype=np.float32)
    marked = english.watermarker.apply_watermark(silence, sample_rate=RATE)
    assert marked.shape == (RATE,) and np.abs(marked).max() < 1e-7


def test_gaps_of_zeros_are_where_rounding_shows(english, perth, samples):
    """PerTh's network sees the rounding errors of soxr there."""
    speech = samples[: 3 * RATE].copy()
    speech[np.arange(len(speech)) % 4800 < 2400] = 0
    with torch.no_grad():
        expected = perth.apply_watermark(speech, sample_rate=RATE)
    marked = english.watermarker.apply_watermark(speech, sample_rate=RATE)
    assert ratio(marked, expected) > 40
    assert abs(confidence(perth, marked) - confidence(perth, expected)) < 0.02


@pytest.mark.parametrize(
    "signal",
    [
        np.full(RATE, np.nan, dtype=np.float32),
        np.ones((2, RATE), dtype=np.float32) / 8,
        np.ones(RATE, dtype=np.int16),
        np.ones(200, dtype=np.float32),
        np.ones(0, dtype=np.float32),
        [0.0] * RATE,
        torch.ones(RATE) / 8,
    ],
    ids=["NaN", "stereo", "integers", "too short", "empty", "list", "tensor"],
)
@pytest.mark.parametrize("device", ["perth", "model"])
def test_what_perth_does_not_take_fails_as_with_perth(english, signal, device):
    with torch.no_grad():
        expected = outcome(english.watermarker.apply_watermark, signal)
    turbo.apply(english, {"watermark": {"device": device}})
    found = outcome(english.watermarker.apply_watermark, signal)
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and found[0] is expected[0]
    else:
        np.testing.assert_array_equal(found, expected)


def test_audio_of_another_rate_is_perths_to_the_bit(english, perth, samples):
    with torch.no_grad():
        expected = perth.apply_watermark(samples[:16000], sample_rate=16000)
    np.testing.assert_array_equal(
        english.watermarker.apply_watermark(samples[:16000], sample_rate=16000, watermark=None), expected
    )


def test_a_copy_of_the_network_marks_and_goes_with_the_revert(models, encoders):
    """Even where somebody keeps the handle; the watermarker, which models may share, is not touched."""
    model = models("english")
    speak(model)  # upstream completes the voice
    real, before = model.watermarker, snapshot(model)
    state = {name: (id(t), t.data_ptr(), t.clone()) for name, t in real.perth_net.state_dict(keep_vars=True).items()}
    there, ran = encoders(), []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: (
            ran.append((module, torch.is_inference_mode_enabled())) if type(module).__name__ == "Encoder" else None
        )
    )
    try:
        turbo.apply(model, ON_MODEL)
        handle = model.turbo
        wav = speak(model)
    finally:
        hook.remove()
        turbo.revert(model)
    assert [mode for _, mode in ran] == [True] and ran[0][0] is not real.perth_net.encoder
    assert not wav.is_inference() and not wav.requires_grad
    ran.clear()
    assert handle.plan.running and encoders() == there
    assert model.watermarker is real and difference(before, snapshot(model)) == []
    now = real.perth_net.state_dict(keep_vars=True)
    assert {name: (id(t), t.data_ptr()) for name, t in now.items()} == {n: s[:2] for n, s in state.items()}
    assert all(torch.equal(t, state[name][2]) and t.device.type == "cpu" for name, t in now.items())


def test_an_output_that_missed_its_mark_gets_it_on_the_device(english, encoders):
    import perth as package

    there = encoders()
    turbo.apply(english, {**ON_MODEL, "watermark": {"device": "model", "detect": True}})
    assert encoders() == there + 1 and "marked on cpu" in str(english.turbo.report())
    guarded = english.watermarker
    english.watermarker = package.DummyWatermarker()
    try:
        with pytest.warns(turbo.errors.WatermarkWarning):
            wav = speak(english)
    finally:
        english.watermarker = guarded
    assert guarded.get_watermark(wav[0].numpy(), sample_rate=RATE).mean() == 1.0


def test_code_of_perth_that_is_not_known_stays_in_place(english, monkeypatch, samples, encoders):
    """Unless the pass is demanded."""
    kind, original = type(english.watermarker), english.watermarker.apply_watermark

    def apply_watermark(self, signal, sample_rate, **_):
        return 2 * original(signal, sample_rate)

    apply_watermark.__module__ = kind.__module__
    monkeypatch.setattr(kind, "apply_watermark", apply_watermark)
    there = encoders()
    turbo.apply(english, ON_MODEL)
    assert encoders() == there and "not one that this package reproduces" in english.turbo.plan.step("watermark").reason
    with torch.no_grad():
        expected = 2 * original(samples, RATE)
    np.testing.assert_array_equal(english.watermarker.apply_watermark(samples, sample_rate=RATE), expected)
    turbo.apply(english, {"watermark": {"device": "model", "enabled": True}})
    assert encoders() == there + 1


def test_the_ceiling_exact_refuses_it(english):
    with pytest.raises(InvalidConfigError, match="watermark is numerical, above the ceiling"):
        turbo.apply(english, {"fidelity": "exact", "watermark": {"device": "model"}})
    assert turbo.inspect(english, {"watermark": {"device": "model"}}).step("watermark").fidelity == "numerical"
    assert turbo.inspect(english, "auto").step("watermark").fidelity == "exact"


@pytest.mark.parametrize("stand_in, reason", [("None", "setuptools<81"), ("DummyWatermarker", "not PerTh's")])
def test_without_perth_it_is_refused(english, stand_in, reason):
    import perth as package

    real = english.watermarker
    english.watermarker = None if stand_in == "None" else package.DummyWatermarker()
    try:
        with pytest.raises(UnavailablePassError, match=reason):
            turbo.apply(english, {"watermark": {"enabled": True, "device": "model"}})
        step = turbo.inspect(english, ON_MODEL).step("watermark")
    finally:
        english.watermarker = real
    assert step.status == "skipped" and reason in step.reason


@pytest.mark.parametrize("source, target", [(24000, 32000), (32000, 24000), (24000, 16000), (48000, 24000)])
@pytest.mark.parametrize("n", [1, 100, 101, 102, 24000])
def test_resampling_is_soxrs(noise, source, target, n):
    expected = resample(noise[:n], source, target)
    found = Resampler(source, target, "cpu")(torch.tensor(noise[:n])).numpy()
    assert found.shape == expected.shape
    assert ratio(found, expected) > 110
    if n == 24000:
        assert ratio(resample_on("cpu")(noise[:n], source, target), expected) < 60


def test_samples_are_copied_to_the_device_and_back():
    samples = np.arange(5.0)[::-1]
    there = upload(samples, torch.device("cpu"))
    back = download(there)
    assert there.dtype == torch.float32 and back.dtype == np.float32
    np.testing.assert_array_equal(back, samples)
    there += 1
    np.testing.assert_array_equal(samples, np.arange(5.0)[::-1])


@pytest.mark.gpu
def test_on_a_gpu_it_is_marked_there():
    from chatterbox_turbo import synthetic

    model = synthetic.build("english", "tiny", device="cuda")
    places = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: places.append(given[0].device.type) if type(module).__name__ == "Encoder" else None
    )
    try:
        comparisons = compare(model, ALONE, [request_for(model)], seeds=(0, 1))
    finally:
        hook.remove()
    assert "cuda" in places
    assert {p.device.type for p in model.watermarker.perth_net.parameters()} == {"cpu"}
    assert [c.broken("numerical") for c in comparisons] == ["", ""]
