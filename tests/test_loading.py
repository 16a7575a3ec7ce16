"""`load` gives what upstream's `from_local` gives, from any checkpoint that this loads, and explains what it cannot."""

from __future__ import annotations

import gc
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from loading_tools import assert_equal, differences, ours, read, upstreams, weights
from safetensors.torch import save_file
from test_synthetic import INSTALLED, has, speak
from torch import nn

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import (
    InvalidConfigError,
    InvalidRequestError,
    ModelUnavailableError,
    UnsupportedModelError,
)
from chatterbox_turbo.runtime.loading import construction
from chatterbox_turbo.runtime.loading.mapped_files import MappedFiles
from chatterbox_turbo.upstream.loading import model_class

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
MULTILINGUAL = pytest.mark.skipif(not has("multilingual"), reason="the installed chatterbox-tts has no multilingual")


pytestmark = pytest.mark.usefixtures("nothing_global_changes")


# --- equal to upstream's


@pytest.mark.parametrize("family", INSTALLED)
def test_equal_to_upstreams_own_in_every_tensor_and_attribute(saved, family):
    theirs = upstreams(family, saved(family))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    loaded = ours(family, saved(family))
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(theirs, loaded)
    assert list(weights(loaded)) == list(weights(theirs))
    assert torch.equal(speak(loaded, family), speak(theirs, family))


def test_differences_are_seen(saved):
    """The comparison above finds what it is there for."""
    theirs, loaded = upstreams("english", saved("english")), ours("english", saved("english"))
    loaded.s3gen.mel2wav.stft_window = loaded.s3gen.mel2wav.stft_window * 1.0001  # a plain attribute
    loaded.s3gen.trim_fade[3] += 1  # a buffer that is in no state_dict
    loaded.ve.lstm.weight_hh_l0.requires_grad_(False)
    loaded.t3.tfmr.layers[1].train()
    found = "\n".join(differences(theirs, loaded))
    assert all(name in found for name in ("stft_window", "trim_fade", "weight_hh_l0", "training"))


@pytest.mark.parametrize("family", ["english", pytest.param("multilingual", marks=MULTILINGUAL)])
def test_half_precision_files_come_in_the_modules_precision(copy, family):
    folder = copy(family)
    for path in folder.glob("*.safetensors"):
        save_file({k: v.half() if v.is_floating_point() else v for k, v in read(path).items()}, path)
    for path in (p for p in folder.glob("*.pt") if p.name != "conds.pt"):
        torch.save({k: v.half() if v.is_floating_point() else v for k, v in read(path).items()}, path)
    loaded = ours(family, folder)
    assert loaded.t3.speech_head.weight.dtype == torch.float32
    assert_equal(upstreams(family, folder), loaded)


@MULTILINGUAL
def test_archives_of_any_make(copy):
    """The format from before 1.6, which cannot be mapped; and tensors that are views of one another."""
    folder = copy("multilingual")
    torch.save(read(folder / "ve.pt"), folder / "ve.pt", _use_new_zipfile_serialization=False)
    tensors = read(folder / "s3gen.pt")
    name = "flow.input_embedding.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name]], 1)[:, ::2]
    torch.save(tensors, folder / "s3gen.pt")
    theirs, loaded = upstreams("multilingual", folder), ours("multilingual", folder)
    assert_equal(theirs, loaded)
    assert torch.equal(loaded.s3gen.flow.input_embedding.weight, tensors[name])


def test_what_upstream_ignores_is_ignored(copy):
    """English reads s3gen with strict=False: its released checkpoint lacks a buffer that the constructor computes."""
    folder = copy("english")
    tensors = read(folder / "s3gen.safetensors")
    window = tensors.pop("tokenizer.window")
    save_file({**tensors, "something.else": torch.zeros(3)}, folder / "s3gen.safetensors")
    loaded = ours("english", folder)
    assert torch.equal(loaded.s3gen.tokenizer.window, window)
    assert_equal(upstreams("english", folder), loaded)


def test_names_of_old_weight_norm_are_understood(copy):
    """What upstream's modules rename while they load is renamed."""
    folder = copy("english")
    new, old = ("parametrizations.weight.original0", "parametrizations.weight.original1"), ("weight_g", "weight_v")
    tensors = read(folder / "s3gen.safetensors")
    renamed = {k.replace(new[0], old[0]).replace(new[1], old[1]): v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "s3gen.safetensors")
    assert_equal(upstreams("english", folder), ours("english", folder))


@pytest.mark.gpu
def test_straight_to_a_gpu(saved):
    loaded = ours("english", saved("english"))
    with synthetic.architecture("tiny"):
        there = turbo.load("english", "cuda", folder=saved("english"), optimize=False)
    assert {t.device.type for t in weights(there).values()} == {"cuda"}
    assert all(torch.equal(t.cpu(), weights(loaded)[name]) for name, t in weights(there).items())
    assert speak(there, "english").isfinite().all()


# --- sources, options, optimization


def test_a_class_a_subclass_and_a_name_are_the_same(saved):
    cls = model_class("english")

    class Mine(cls):
        pass

    by_class, by_subclass = ours(cls, str(saved("english"))), ours(Mine, saved("english"))
    assert type(by_class) is cls and type(by_subclass) is Mine
    assert_equal(ours("english", saved("english")), by_class)


def test_the_model_is_optimized_unless_asked_not_to(saved):
    with synthetic.architecture("tiny"):
        model = turbo.load("english", "cpu", "exact", folder=saved("english"))
    assert model.turbo.config.preset == "exact" and "decoding" in model.turbo.plan.running
    turbo.revert(model)
    assert_equal(upstreams("english", saved("english")), model)
    assert not hasattr(ours("english", saved("english")), "turbo")


def test_the_device_can_be_left_to_us_and_be_an_object(saved):
    with synthetic.architecture("tiny"):
        one = turbo.load("vc", folder=saved("vc"), optimize=False)
        other = turbo.load("vc", torch.device("cpu"), folder=saved("vc"), optimize=False)
    assert one.device == ("cuda" if torch.cuda.is_available() else "cpu") and other.device == torch.device("cpu")


def test_a_wrong_configuration_is_found_before_anything_is_loaded(tmp_path):
    with pytest.raises(InvalidConfigError, match="did you mean"):
        turbo.load("english", "cpu", {"decodign": {}}, folder=tmp_path / "none")


@pytest.mark.parametrize(
    ("source", "device", "options", "error", "message"),
    [
        ("klingon", "cpu", {}, ModelUnavailableError, "Unknown model 'klingon'.*english, multilingual"),
        (int, "cpu", {}, UnsupportedModelError, "neither one of upstream's classes.*ChatterboxTTS"),
        (object(), "cpu", {}, UnsupportedModelError, r"apply\(model\)"),
        ("english", "abacus", {}, InvalidRequestError, "unknown device 'abacus'.*cuda:N"),
        ("english", "cpu:", {}, InvalidRequestError, "unknown device 'cpu:'"),
        ("english", "cpu:²", {}, InvalidRequestError, "unknown device 'cpu:²'"),
        ("english", "cuda:99", {}, InvalidRequestError, "no device cuda:99"),
        ("k" * 10**6, "cpu", {}, ModelUnavailableError, r"^.{,100}… \(1,000,000 characters\).{,100}$"),
        ("english", "c" * 10**6, {}, InvalidRequestError, r"^.{,100}… \(1,000,000 characters\).{,100}$"),
        ("english", "cpu", {"nana": True}, InvalidRequestError, "no option nana.*Options of its loader: none"),
    ],
)
def test_misuse_is_explained(tmp_path, source, device, options, error, message):
    with pytest.raises(error, match=message):
        turbo.load(source, device, folder=tmp_path, **options)


# --- threads, files


@pytest.mark.exhaustive
def test_several_threads_load_at_once(saved):
    families = [case.values[0] for case in INSTALLED if has(case.values[0])]
    theirs = {family: upstreams(family, saved(family)) for family in families}
    with synthetic.architecture("tiny"), ThreadPoolExecutor(6) as pool:
        wanted = families * 2
        loaded = list(pool.map(lambda f: turbo.load(f, "cpu", folder=saved(f), optimize=False), wanted))
    for family, model in zip(wanted, loaded, strict=True):
        assert_equal(theirs[family], model)


def test_a_thread_that_builds_meanwhile_gets_initial_values():
    built = []
    with construction.WithoutInitialValues():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(3, 3)))
        thread.start()
        thread.join()
        assert nn.Linear(3, 3).weight.is_meta
    assert not built[0].weight.is_meta and built[0].weight.abs().sum() > 0


@LINUX
@pytest.mark.parametrize("family", ["english", pytest.param("multilingual", marks=MULTILINGUAL)])
def test_no_file_stays_mapped_or_open(copy, family):
    folder = copy(family)
    model = ours(family, folder)
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    for path in folder.iterdir():
        path.write_bytes(b"\xff" * path.stat().st_size)  # in place, as a careless update does
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@LINUX
@pytest.mark.parametrize("family", ["english", pytest.param("multilingual", marks=MULTILINGUAL)])
def test_weights_may_stay_in_their_files(copy, family):
    folder = copy(family)
    theirs, model = upstreams(family, folder), ours(family, folder, mapped=True)
    assert_equal(theirs, model)
    assert str(folder) in Path("/proc/self/maps").read_text()
    # within rounding: a mapped weight may begin anywhere in a line of the cache
    torch.testing.assert_close(speak(model, family), speak(theirs, family), atol=1e-4, rtol=0.0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.t3.speech_head.weight.mul_(2)
    assert torch.equal(model.t3.speech_head.weight, theirs.t3.speech_head.weight * 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # writes stay in the process
    shutil.rmtree(folder)
    assert torch.equal(model.ve.proj.weight, theirs.ve.proj.weight)


@LINUX
@pytest.mark.parametrize("kind", ["safetensors", "archive"])
def test_pages_of_the_file_do_not_stay_resident(tmp_path, kind):
    def resident() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    tensors, size = {str(n): torch.full((2**21,), float(n)) for n in range(16)}, 2**23
    path = tmp_path / "weights"
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    files, before = MappedFiles(), resident()
    mapped = getattr(files, kind)(path)
    for name in tensors:
        assert torch.equal(files.place(mapped[name], torch.device("cpu"), torch.float32), tensors[name])
        assert resident() - before < 1.5 * size
    assert sum(tensor.sum() for tensor in mapped.values()) == 2**21 * 120  # and is there when it is asked for again
    assert resident() - before > 12 * size


@LINUX
def test_what_was_written_to_a_mapped_tensor_is_not_lost(tmp_path):
    save_file({"one": torch.ones(2**20)}, tmp_path / "weights")
    files = MappedFiles()
    tensor = files.safetensors(tmp_path / "weights")["one"]
    tensor.mul_(3)
    for _ in range(2):
        assert files.place(tensor, torch.device("cpu"), torch.float32)[5] == 3
    assert read(tmp_path / "weights")["one"][5] == 1
