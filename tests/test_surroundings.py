"""What surrounds a call changes neither what the call gives nor what is kept for later ones."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import FAMILIES, TEXT, speak
from loading_tools import differences as model_differences
from loading_tools import ours, upstreams
from recordings import differences, encode, voice_of, wav
from snapshots import difference, snapshot, voice_kinds

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import ModelUnavailableError
from chatterbox_turbo.measure.fidelity import kind_of, snr_db
from chatterbox_turbo.runtime.cpu import onednn
from chatterbox_turbo.runtime.cpu.measurements import CACHE_VARIABLE
from chatterbox_turbo.runtime.device.quantized import four_bit_floats, normal_floats
from chatterbox_turbo.runtime.device.surroundings import plain
from chatterbox_turbo.runtime.voice.features import MelSpectrogram
from chatterbox_turbo.upstream.families import identify

SAME, OTHER, FAILS = "same", "other", "fails"


@dataclass(frozen=True)
class Surrounding:
    """What may be around a call, and what each entry point gives there against a call with nothing around it.

    ``SAME``: to the bit. ``OTHER``: another model, or other speech. ``FAILS``: an error.
    In every row it is ``SAME`` for ``generate``, ``prepare_conditionals``, ``set_target_voice``, ``model.turbo.batch``,
    for the functions that passes replace, and for all calls after ``apply``, warm-up and ``revert`` inside.
    The number of threads is no row: kernels follow it, and round otherwise.

    Attributes:
        load: of ``load``, which does what upstream's loader does there.
        upstream: of upstream's ``generate`` and ``prepare_conditionals``, for comparison.
        inference: the samples are an inference tensor.
    """

    make: Callable[[], Any]
    load: str = SAME
    upstream: str = SAME
    inference: bool = False


@contextlib.contextmanager
def _set(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def _gradients_in_inference_mode():
    with torch.inference_mode(), torch.enable_grad():
        yield


def autocast(dtype):
    return functools.partial(torch.autocast, "cpu", dtype)


def default(dtype):
    return lambda: _set(torch.set_default_dtype, dtype, torch.float32)


SURROUNDINGS = {
    "autocast bfloat16": Surrounding(autocast(torch.bfloat16), upstream=FAILS),
    "autocast float16": Surrounding(autocast(torch.float16), upstream=OTHER),
    "default bfloat16": Surrounding(default(torch.bfloat16), load=OTHER, upstream=OTHER),
    "default float16": Surrounding(default(torch.float16), load=OTHER, upstream=OTHER),
    "default float64": Surrounding(default(torch.float64), load=OTHER, upstream=FAILS),
    "meta device": Surrounding(lambda: torch.device("meta"), load=FAILS, upstream=FAILS),
    "no gradients": Surrounding(torch.no_grad),
    "gradients": Surrounding(torch.enable_grad),
    "inference mode": Surrounding(torch.inference_mode, inference=True),
    "gradients in inference mode": Surrounding(_gradients_in_inference_mode, inference=True),
    "forward gradients": Surrounding(torch.autograd.forward_ad.dual_level),
    "anomaly detection": Surrounding(lambda: torch.autograd.set_detect_anomaly(True, check_nan=False)),
    "deterministic": Surrounding(lambda: _set(torch.use_deterministic_algorithms, True, False)),
}
MAIN = ("autocast bfloat16", "default bfloat16", "default float64", "meta device", "inference mode")
OFTEN = (*MAIN, "deterministic")
FEW = ("autocast bfloat16", "default bfloat16", "inference mode")
ROWS = [(family, name) for family in FAMILIES for name in (OFTEN if family in ("english", "turbo") else FEW)]
ROWS += [("english", name) for name in SURROUNDINGS if name not in OFTEN]
QUIET = {"preset": "auto", "decoding": {"enabled": "auto", "progress": "off"}}


@pytest.fixture(scope="module")
def surrounded(models):
    """``surrounded(family)``: the session's model with preset auto; reverted and given its voice back at the end."""
    used = {}

    def get(family):
        model = models(family)
        used.setdefault(family, (model, identify(model).voice))
        if not hasattr(model, "turbo"):
            turbo.apply(model, QUIET)
        return model

    yield get
    for model, held in used.values():
        turbo.revert(model)
        setattr(model, "ref_dict" if hasattr(model, "ref_dict") else "conds", held)


@pytest.fixture(scope="module")
def outside(surrounded, voice):
    """``outside(family)``: voice and samples of that model with nothing around its calls, computed once."""
    found = {}

    def get(family):
        if family not in found:
            encode(model := surrounded(family), voice)
            found[family] = voice_of(model), speak(model)
        return found[family]

    return get


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "name"), ROWS)
def test_a_call_and_those_after_it_are_as_if_nothing_were_around(surrounded, outside, voice, family, name):
    row, (expected_voice, expected) = SURROUNDINGS[name], outside(family)
    model = surrounded(family)
    model.turbo.voices.clear()
    with row.make():
        encode(model, voice)
        kinds, held = set(voice_kinds(model).values()), voice_of(model)
        inside = speak(model)
    assert kinds == {"float32 on cpu", "int64 on cpu"} and not differences(held, expected_voice)
    assert torch.equal(inside, expected)
    assert inside.dtype == torch.float32 and inside.is_inference() == row.inference and not inside.requires_grad
    encode(model, voice)
    assert not differences(voice_of(model), expected_voice), "the voice that was kept is another"
    assert torch.equal(speak(model), expected)


def test_a_default_device_of_a_thread(surrounded, outside, voice):
    """``torch.set_default_device`` cannot be taken back (torch 2.6), but it holds for one thread."""
    model, results, (_, expected) = surrounded("vc"), [], outside("vc")
    model.turbo.voices.clear()

    def call():
        torch.set_default_device("meta")
        encode(model, voice)
        results.append(speak(model))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    encode(model, voice)
    for samples in (*results, speak(model)):
        assert torch.equal(samples, expected)
    assert results


@pytest.mark.parametrize("name", MAIN)
def test_a_batch_inside_is_a_batch_outside(surrounded, name):
    model, items = surrounded("turbo"), [{"text": TEXT, "seed": 3}, {"text": TEXT, "seed": 4}]
    expected = model.turbo.batch(items)
    with SURROUNDINGS[name].make():
        inside = model.turbo.batch(items)
    for wavs in (inside, model.turbo.batch(items)):
        assert all(map(torch.equal, wavs, expected))


@pytest.mark.parametrize("name", [*MAIN, "deterministic"])
@pytest.mark.parametrize("family", ["english", "turbo"])
def test_applying_warming_up_and_reverting_inside(kept, outside, voice, family, name):
    _, expected = outside(family)
    model = turbo.revert(kept(family))
    before = snapshot(model)
    with SURROUNDINGS[name].make():
        turbo.apply(model, {**QUIET, "warmup": {"enabled": True, "level": "full"}})
    held = model.conds
    encode(model, voice)
    assert torch.equal(speak(model), expected)
    model.conds = held
    with SURROUNDINGS[name].make():
        turbo.revert(model)
    assert difference(before, snapshot(model)) == []


@pytest.mark.parametrize("name", MAIN)
def test_t3_and_the_acoustic_half_may_be_called_alone(surrounded, name):
    """As servers do that stream; one key of the flow's runner gets the same kinds of tensors inside and outside."""
    model = surrounded("english")
    text = torch.tensor([[255, *range(10, 30), 0]]).repeat(2, 1)

    def call():
        torch.manual_seed(0)
        ids = model.t3.inference(t3_cond=model.conds.t3, text_tokens=text, max_new_tokens=12)
        with torch.inference_mode():
            states, _ = model.s3gen.flow.encoder(torch.ones(1, 8, model.s3gen.flow.encoder.output_size()), EIGHT)
            mel, *_ = model.s3gen.flow.decoder(
                mu=states.transpose(1, 2)[:, :80].contiguous(),
                mask=torch.ones(1, 1, 16),
                spks=torch.ones(1, 80),
                cond=torch.zeros(1, 80, 16),
                n_timesteps=2,
            )
        return ids, mel

    expected = call()
    # the modules around the functions that are replaced are upstream's, and follow what is around them
    exact = not name.startswith(("default", "meta"))
    with SURROUNDINGS[name].make() if exact else contextlib.nullcontext():
        inside = call()
    for result in (inside, call()):
        assert all(map(torch.equal, result, expected))


EIGHT = torch.tensor([8])


@pytest.mark.parametrize("name", ["deterministic", "no gradients", "inference mode"])
def test_exact_is_upstream_inside_the_same(kept, voice, name):
    model, row = turbo.revert(kept("english")), SURROUNDINGS[name]
    with row.make():
        encode(model, voice)
        reference = speak(model)
    turbo.apply(model, "exact")
    with row.make():
        encode(model, voice)
        assert torch.equal(inside := speak(model), reference) and kind_of(inside) == kind_of(reference)


@pytest.mark.parametrize("name", ["autocast bfloat16", "default bfloat16", "meta device", "inference mode"])
def test_loading_is_upstreams_inside_the_same(saved, name):
    row, folder = SURROUNDINGS[name], saved("vc")
    if row.load == FAILS:
        with row.make(), pytest.raises(ModelUnavailableError):
            ours("vc", folder)
        return
    with row.make():
        theirs, loaded = upstreams("vc", folder), ours("vc", folder)
    assert not model_differences(theirs, loaded)
    assert (next(loaded.s3gen.parameters()).dtype == torch.float32) == (row.load == SAME)


def test_a_voice_belongs_to_the_kernels_that_computed_it(surrounded, samples):
    """The order of sums follows the number of threads; for another number upstream's voice is another, too."""
    model, short = surrounded("vc"), samples[:6000]
    voices = model.turbo.voices
    encode(model, wav(short))
    expected, misses = voice_of(model), voices.misses
    for _ in range(2):
        with _set(torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()):
            encode(model, wav(short))
    assert voices.misses == misses + 1
    encode(model, wav(short))
    assert voices.misses == misses + 1 and not differences(voice_of(model), expected)


@pytest.mark.parametrize("name", [name for name, row in SURROUNDINGS.items() if row.upstream in (OTHER, FAILS)])
def test_what_is_made_in_plain_surroundings(name):
    """Each of these gives something else without ``plain``, in at least one row."""

    def made():
        weight = torch.nn.Linear(4, 4).weight.detach().fill_(0.3)
        whole = torch.arange(1, 5)
        return [
            torch.zeros(2),
            torch.tensor([0.1, 2]),
            torch.tensor([1, 2]),
            torch.arange(0.1, 1),
            torch.full((2,), 0.1),
            torch.full((2,), 3),
            torch.linspace(0, 1, 7),
            torch.hann_window(9),
            torch.scalar_tensor(1),
            torch.tensor([1.5], dtype=torch.bfloat16),
            torch.as_tensor(torch.ones(1, dtype=torch.float64)),
            whole / 3,
            0.1 * whole,
            whole.to(torch.bfloat16),
            whole.half(),
            whole.double() / 3,
            torch.nn.functional.linear(torch.ones(1, 4, dtype=torch.float32, device="cpu") / 3, weight.cpu().float()),
        ]

    torch.manual_seed(0)
    expected, drawn = made(), torch.rand(3)
    with SURROUNDINGS[name].make(), plain():
        torch.manual_seed(0)
        result = made()
        assert torch.equal(torch.rand(3), drawn)
        assert torch.empty(1, device="meta").is_meta
        with plain():
            assert torch.empty(1).dtype == torch.float32
    for one, other in zip(result, expected, strict=True):
        assert kind_of(one) == kind_of(other) and torch.equal(one, other)


def test_plain_surroundings_are_this_threads_alone():
    """Transformers sets the default format while it loads a model, maybe in another thread."""
    seen = []
    with default(torch.bfloat16)(), pytest.raises(KeyError), plain():
        thread = threading.Thread(target=lambda: seen.append(torch.empty(1).dtype))
        thread.start()
        thread.join()
        assert torch.empty(1).dtype == torch.float32
        raise KeyError
    assert seen == [torch.bfloat16]
    with default(torch.bfloat16)(), torch.autocast("cpu", torch.bfloat16):
        with contextlib.suppress(KeyError), plain():
            raise KeyError
        assert torch.empty(1).dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu")


def test_what_is_kept_names_its_format(samples):
    """A default that another thread sets in the middle of a call does not get in."""
    import librosa

    spectrogram = MelSpectrogram(librosa.filters.mel(sr=24_000, n_fft=1920, n_mels=80), 1920, 480)
    with default(torch.bfloat16)():
        inside = spectrogram(samples[:4800])
    assert inside.dtype == torch.float32 and torch.equal(inside, spectrogram(samples[:4800]))


@pytest.mark.parametrize("name", ["default bfloat16", "meta device"])
def test_tables_that_are_kept_are_the_same_whoever_asks_first(name):
    for table in (normal_floats, four_bit_floats):
        expected = table()
        with SURROUNDINGS[name].make():
            first = table.__wrapped__()
        assert kind_of(first) == kind_of(expected) and torch.equal(first, expected)


def test_products_are_measured_in_fp32_inside_autocast(tmp_path, monkeypatch):
    if onednn.onednn() is None:
        pytest.skip("this build has no oneDNN")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    linear, kinds = torch.nn.functional.linear, set()

    def watched(x, weight):
        kinds.add(kind_of(result := linear(x, weight)))
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    with torch.autocast("cpu", torch.bfloat16), default(torch.bfloat16)():
        onednn.onednn_is_faster.__wrapped__(1)
    assert kinds == {kind_of(torch.ones(1, 1))}


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_that_was_made_in_inference_mode(inside):
    """Its parameters have no version; upstream can speak with it in that mode alone."""
    with torch.inference_mode():
        model = synthetic.build("turbo", "tiny", stop_after=12)
        expected = speak(model)
    with torch.inference_mode(inside):
        turbo.apply(model, {"preset": "fast", "decoding": {"progress": "off"}})
    with torch.inference_mode():
        assert snr_db(speak(model), expected) > 20
    with torch.inference_mode(inside):
        turbo.apply(model, {"preset": "fast", "decoding": {"progress": "off", "kernel": "torch"}})
        turbo.revert(model)
    with torch.inference_mode():
        assert torch.equal(speak(model), expected)
