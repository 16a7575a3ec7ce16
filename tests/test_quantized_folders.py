"""Quantized checkpoint folders: what is in them, what is loaded from them, and what is said of bad ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from cases import difference, require, snapshot, speak
from loading_tools import assert_equal, differences, in_cache, ours, read, weights
from safetensors.torch import load_file, save_file

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import (
    InvalidRequestError,
    ModelUnavailableError,
    OriginalsDiscardedWarning,
    TurboError,
    UnavailablePassError,
)
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.device.quantized import QuantizedLinear
from chatterbox_turbo.runtime.device.rounding import quantize as round_matrix
from chatterbox_turbo.runtime.loading.new_folder import fcntl
from chatterbox_turbo.upstream import quantized_writer
from chatterbox_turbo.upstream.loading import model_class

pytestmark = pytest.mark.usefixtures("nothing_global_changes")
# tiny models of two blocks have nothing between the ends that the other strategies leave
MADE = {
    "english": {"scheme": "int8", "strategy": "aggressive"},
    "multilingual": {"scheme": "int8", "strategy": "balanced"},
    "turbo": {"scheme": "int4", "strategy": "aggressive", "rounding": "nearest"},
    "nano": {"scheme": "int8", "strategy": "aggressive"},
}
PRESETS = {"english": ("exact", "auto", "fast", "low_vram"), "multilingual": ("auto",), "turbo": ("fast",)}
PRESETS["nano"] = ("auto",)
OFF = {name: {"enabled": False} for name, _ in turbo.OptimizationConfig().sections() if name != "quantization"}
NAME = "chatterbox_turbo.json"


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    """``quantized(family)``: the folder of a tiny quantized checkpoint, written once; for reading only."""
    folders = {}

    def get(family: str) -> Path:
        if family not in folders:
            require(family)
            folder = tmp_path_factory.mktemp("quantized") / family
            with synthetic.architecture("tiny"):
                folders[family] = turbo.quantize(family, folder, saved(family), **MADE[family])
        return folders[family]

    return get


@pytest.fixture
def damaged(quantized, tmp_path):
    """The files of English, for replacing some."""
    return linked(quantized("english"), tmp_path / "linked")


def section(family, **more):
    return {"t3": MADE[family]["scheme"], **{k: v for k, v in MADE[family].items() if k != "scheme"}, **more}


def linked(source, folder):
    """A folder of the same files, for replacing some."""
    return Path(shutil.copytree(source, folder, copy_function=os.link))


def reverted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OriginalsDiscardedWarning)
        return turbo.revert(model)


# --- what is in a folder


@pytest.mark.parametrize("family", MADE)
def test_nothing_in_a_folder_is_pickled(saved, quantized, family):
    folder = quantized(family)
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            assert load_file(path)
        else:
            assert path.suffix == ".json" and json.loads(path.read_text(encoding="utf-8")), path
    description = json.loads((folder / NAME).read_text(encoding="utf-8"))
    assert (description["family"], description["scheme"]) == (family, MADE[family]["scheme"])
    assert set(description["files"]) | {NAME} == {path.name for path in folder.iterdir()}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")], "what was written beside it"
    t3 = next(path for path in saved(family).iterdir() if path.name.startswith("t3_"))
    assert (folder / description["t3"]).stat().st_size < t3.stat().st_size, "tiny models have large embeddings"
    with pytest.raises(FileNotFoundError), synthetic.architecture("tiny"):
        model_class(family).from_local(folder, "cpu")  # upstream's own does not take it for one of its own


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", MADE)
def test_it_is_the_original_that_apply_quantizes(saved, quantized, family):
    original, loaded = ours(family, saved(family)), ours(family, quantized(family))
    gen = {name: part.contiguous() if torch.is_tensor(part) else part for name, part in original.conds.gen.items()}
    original.conds.gen, own, original.t3 = gen, original.t3, loaded.t3
    differing = [found for found in differences(original, loaded) if "name_or_path" not in found]
    assert differing == []  # in everything but T3, the voice included
    original.t3 = own

    for preset in PRESETS[family]:
        config = {"preset": preset, "decoding": {"progress": "off"}}
        if preset == "exact":  # what this ceiling leaves out is left out below the other, which quantization needs
            given = {"decoding": {"progress": "off", "backbone": "upstream"}, "flow": {"enabled": False}}
            config = {**config, "fidelity": "lossy", "conditioning": {"matmul": "torch"}, **given}
        turbo.apply(original, {**config, "fidelity": "lossy", "quantization": section(family)})
        turbo.apply(loaded, {"preset": preset, "decoding": {"progress": "off"}})
        assert torch.equal(speak(loaded), speak(original)), preset
    with pytest.warns(OriginalsDiscardedWarning, match=f"T3 stays {MADE[family]['scheme']}.*original checkpoint"):
        turbo.revert(loaded)
    turbo.apply(original, {**OFF, "fidelity": "lossy", "quantization": section(family, originals="discard")})
    reverted(original)
    expected, given = weights(original), weights(loaded)
    names = [name for name in expected if "patched_model" not in name]
    assert [name for name in names if not torch.equal(expected[name], given[name])] == []
    assert any(isinstance(layer, QuantizedLinear) for layer in loaded.t3.modules())
    if family != "multilingual":  # 14 layers take upstream's own generate long
        assert torch.equal(speak(loaded), speak(original))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_schemes_with_a_table(saved, tmp_path, scheme):
    layer = ours("english", quantize(saved, tmp_path / "new", scheme=scheme)).t3.tfmr.layers[1].mlp.down_proj
    expected = round_matrix(read(saved("english") / "t3_cfg.safetensors")["tfmr.layers.1.mlp.down_proj.weight"], scheme)
    assert torch.equal(layer.codes, expected.codes) and torch.equal(layer.scales, expected.scales)
    assert (layer.scheme, layer.zeros) == (scheme, None)


# --- loading


def test_weights_may_stay_in_their_files(quantized):
    theirs, loaded = ours("english", quantized("english")), ours("english", quantized("english"), mapped=True)
    assert_equal(theirs, loaded)
    if sys.platform == "linux":
        assert f"{quantized('english')}/t3.int8.safetensors" in Path("/proc/self/maps").read_text()
    turbo.apply(loaded, {"decoding": {"progress": "off"}})
    turbo.apply(theirs, {"decoding": {"progress": "off"}})
    # a mapped weight may begin anywhere in a line of the cache, where some products round otherwise
    assert snr_db(speak(loaded), speak(theirs)) > 90


def test_the_plan_says_what_the_weights_are(quantized):
    model = ours("english", quantized("english"))
    before = snapshot(model)
    step = turbo.inspect(model).step("quantization")
    assert (step.status, step.fidelity) == ("off", "lossy")
    assert "T3 was int8 before: every promise, exact included, is against these" in step.reason
    for asked in ("int8", "auto"):
        turbo.apply(model, {"fidelity": "lossy", "quantization": {"t3": asked, "strategy": "aggressive"}})
        assert "T3 in int8" in model.turbo.plan.step("quantization").reason
        assert "they were that before, and reverting leaves them so" in str(model.turbo.report())
    with pytest.raises(UnavailablePassError, match=r"quantized already \(int8\)"):
        turbo.apply(model, {"fidelity": "lossy", "quantization": {"enabled": True, "t3": "int4"}})
    reverted(model)
    assert difference(before, snapshot(model)) == []


def test_the_plan_of_an_original_says_nothing_of_it(saved):
    model = ours("english", saved("english"))
    assert turbo.inspect(model).step("quantization").fidelity == "exact"
    turbo.apply(model, {**OFF, "fidelity": "lossy", "quantization": section("english")})
    step = turbo.inspect(model).step("quantization")  # its own layers do not count
    assert (step.fidelity, step.reason) == ("exact", "quantization.t3 is none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turbo.revert(model)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_neither_writing_nor_loading_holds_the_original(saved, quantized, tmp_path):
    require("multilingual")

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    def begin() -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the highest use begins anew
        return status("VmRSS")

    folder, before = quantized("multilingual"), []
    quantize(saved, tmp_path / "new", progress=lambda *_: before or before.append(begin()))
    writing = status("VmHWM") - before[0]
    assert writing < 0.25 * sum(path.stat().st_size for path in saved("english").glob("*.safetensors"))

    start = begin()
    model = ours("multilingual", folder)
    loading, loaded = status("VmHWM") - start, sum(tensor.nbytes for tensor in weights(model).values())
    assert sum(path.stat().st_size for path in saved("multilingual").iterdir()) > 1.3 * loaded
    assert loading < 1.3 * loaded


def test_quantizing_takes_what_the_hub_has_cached(saved, monkeypatch, tmp_path):
    in_cache(monkeypatch, tmp_path / "hub", saved("english"), "ResembleAI/chatterbox")
    with synthetic.architecture("tiny"):
        turbo.quantize("english", tmp_path / "new", strategy="aggressive")
    assert ours("english", tmp_path / "new").conds is not None


# --- folders that will not do


def rewritten(name, change):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).unlink()  # others have the same file
        (folder / name).write_bytes(change(content))

    return damage


def described(**values):
    return rewritten(NAME, lambda content: json.dumps({**json.loads(content), **values}).encode())


def cut(name, share):
    return rewritten(name, lambda content: content[: int(len(content) * share)])


def flipped(name):
    return rewritten(name, lambda content: content[:-1] + bytes([content[-1] ^ 1]))


def gone(name):
    return lambda folder: (folder / name).unlink()


T3 = "t3.int8.safetensors"
BAD = {
    "description gone": (gone(NAME), rf"lacks {NAME}.*{T3} is part of a quantized checkpoint.*Copy the folder again"),
    "description cut": (cut(NAME, 0.5), rf"Cannot read .*{NAME}.*truncated or damaged.*make it again"),
    "description foreign": (rewritten(NAME, lambda content: b"[]"), r"does not describe.*Something else"),
    "description of another format": (described(format="other"), r"does not describe a quantized checkpoint"),
    "newer": (described(version=2), r"has format 2 .*reads format 1; a newer one.*Install a newer"),
    "no version": (described(version=None), r"contradicts itself"),
    "unknown scheme": (described(scheme="int2"), r"contradicts itself"),
    "unknown key": (described(more=1), r"is damaged.*more"),
    "files elsewhere": (described(t3="../t3.int8.safetensors"), r"contradicts itself"),
    "another model": (described(family="multilingual"), r'holds a quantized .*Multilingual.*Load it as "multilingual"'),
    "T3 gone": (gone(T3), rf"lacks {T3}.*not copied as a whole"),
    "tokenizer gone": (gone("tokenizer.json"), r"lacks tokenizer.json"),
    "T3 cut": (cut(T3, 0.9), rf"{T3} has [\d,]+ bytes, and {NAME} says [\d,]+.*cut off"),
    "a bit of T3": (flipped(T3), rf"{T3} is damaged.*SHA-256"),
    "a bit of the voice": (flipped("conds.safetensors"), r"conds.safetensors is damaged.*SHA-256"),
    "other files are asked for": (described(stand_ins={}), r"was made of a checkpoint without t3_cfg.safetensors"),
}


@pytest.mark.parametrize("damage, message", BAD.values(), ids=BAD)
def test_a_bad_folder_is_told_apart(damaged, damage, message):
    damage(damaged)
    with pytest.raises(ModelUnavailableError, match=message):
        ours("english", damaged)


def test_another_model_is_not_loaded_from_it(quantized):
    for other in ("vc", "multilingual"):
        require(other)
        with pytest.raises(ModelUnavailableError, match=r"holds a quantized ChatterboxTTS \(English\), not"):
            ours(other, quantized("english"))


def test_weights_of_another_tool_are_told_apart(saved, tmp_path):
    folder = linked(saved("english"), tmp_path / "foreign")
    tensors = {**read(folder / "ve.safetensors"), "a.weight.absmax": torch.ones(1)}
    (folder / "ve.safetensors").unlink()
    save_file(tensors, folder / "ve.safetensors")
    for work in (ours, lambda family, folder: turbo.quantize(family, tmp_path / "new", folder)):
        with pytest.raises(ModelUnavailableError, match=r"another tool: it has a.weight.absmax.*original checkpoint"):
            work("english", folder)


# --- quantizing that will not do


def quantize(saved, folder, **options):
    with synthetic.architecture("tiny"):
        return turbo.quantize("english", folder, saved("english"), **{"strategy": "aggressive", **options})


@pytest.mark.parametrize(
    "options, message",
    [({"scheme": "int2"}, "no scheme 'int2'.*int8, int4"), ({"strategy": "bold"}, "no strategy 'bold'.*balanced"),
     ({"rounding": "up"}, "no rounding 'up'.*nearest"), ({"strategy": "balanced"}, "leaves every layer")],
)  # fmt: skip
def test_options_that_cannot_be_had(saved, tmp_path, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        quantize(saved, tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(saved, quantized, tmp_path):
    (tmp_path / "file").touch()
    for there in (tmp_path, tmp_path / "file"):
        with pytest.raises(InvalidRequestError, match=r"exists already.*Nothing is overwritten"):
            quantize(saved, there)
    with pytest.raises(InvalidRequestError, match=r"There is no folder .*none"):
        quantize(saved, tmp_path / "none" / "new")

    def late(name, done, total):
        (tmp_path / "new").mkdir(exist_ok=True)

    with pytest.raises(InvalidRequestError, match="exists already"):
        quantize(saved, tmp_path / "new", progress=late)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "new"} and not list((tmp_path / "new").iterdir())


@pytest.mark.skipif(fcntl is None, reason="this system has no locks that end with their process")
def test_what_a_killed_process_left_is_deleted_by_the_next(saved, tmp_path):
    begins = "import pathlib, sys, time; from chatterbox_turbo.runtime.loading.new_folder import new_folder\n"
    begins += "with new_folder(pathlib.Path(sys.argv[1]), print) as folder:\n"
    begins += "    (folder / 'part').touch(); print('begun', flush=True); time.sleep(600)"
    environment = {**os.environ, "PYTHONPATH": str(Path(turbo.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", begins, str(tmp_path / "new")], env=environment, stdout=subprocess.PIPE
    )
    others = {".new.0123abcd", ".new.0123abcd.mine", ".new.0123ABCD", ".old.0123abcd"}
    try:
        assert process.stdout.readline() == b"begun\n"
        (left,) = tmp_path.iterdir()
        (tmp_path / ".new.0123abcd").touch()  # no folder
        for name in others - {".new.0123abcd"}:
            (tmp_path / name).mkdir()
        quantize(saved, tmp_path / "new")
        assert (left / "part").exists(), "its process lives"
        shutil.rmtree(tmp_path / "new")
    finally:
        process.kill()  # SIGKILL: nothing of it runs any more
        process.wait()
        process.stdout.close()
    assert (left / "part").exists()
    quantize(saved, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"new", *others}


def test_what_has_no_t3_or_is_quantized_already_is_refused(saved, quantized, tmp_path):
    with pytest.raises(ModelUnavailableError, match="nothing to quantize"):
        turbo.quantize("vc", tmp_path / "new", saved("vc"))
    with pytest.raises(ModelUnavailableError, match=r"quantized already \(int8\).*Start from the original"):
        turbo.quantize("english", tmp_path / "new", quantized("english"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_half_written_is_left(saved, tmp_path, error):
    def fail(name, done, total):
        assert [path.name[:5] for path in tmp_path.iterdir()] == [".new."], "written beside it"
        if 2 * done > total:
            raise error("now")

    with pytest.raises(error):
        quantize(saved, tmp_path / "new", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_anything_is_written(saved, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(quantized_writer.shutil, "disk_usage", lambda path: usage(10, 9, 10**6))
    with pytest.raises(TurboError, match=r"1 MiB free, and \d\d are needed"):
        quantize(saved, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_voice_that_needs_pickle_is_refused(saved, tmp_path):
    folder = linked(saved("english"), tmp_path / "other")
    voice = torch.load(folder / "conds.pt", weights_only=True)
    voice["gen"]["name"] = "somebody"
    (folder / "conds.pt").unlink()
    torch.save(voice, folder / "conds.pt")
    with synthetic.architecture("tiny"), pytest.raises(ModelUnavailableError, match=r"gen.name.*it is a str"):
        turbo.quantize("english", tmp_path / "new", folder, strategy="aggressive")
    assert not (tmp_path / "new").exists()
