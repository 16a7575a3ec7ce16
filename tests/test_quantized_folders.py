"""Quantized checkpoint folders: what is in them, and what is loaded from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import quantized_tools
import torch
from cases import require, speak
from loading_tools import assert_equal, differences, in_cache, ours, read, weights
from quantized_tools import MADE, NAME, quantize
from safetensors.torch import load_file
from snapshots import difference, snapshot

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import OriginalsDiscardedWarning, UnavailablePassError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.device.quantized import QuantizedLinear
from chatterbox_turbo.runtime.device.rounding import quantize as round_matrix
from chatterbox_turbo.upstream.loading import model_class

quantized = quantized_tools.quantized
pytestmark = pytest.mark.usefixtures("nothing_global_changes")
PRESETS = {"english": ("exact", "auto", "fast", "low_vram"), "multilingual": ("auto",), "turbo": ("fast",)}
PRESETS["nano"] = ("auto",)
OFF = {name: {"enabled": False} for name, _ in turbo.OptimizationConfig().sections() if name != "quantization"}


def section(family, **more):
    return {"t3": MADE[family]["scheme"], **{k: v for k, v in MADE[family].items() if k != "scheme"}, **more}


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
            given["vocoder"] = {"upsampling": "whole", "layout": "channels_first"}
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


GROWTH = """
import json, sys
from pathlib import Path
from loading_tools import ours, weights
from quantized_tools import quantize

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

def begin(*_):
    Path("/proc/self/clear_refs").write_text("5")  # the highest use begins anew
    return status("VmRSS")

english, folder, new = map(Path, sys.argv[1:])
before = []
quantize(lambda _: english, new, progress=lambda *_: before or before.append(begin()))
writing = status("VmHWM") - before[0]
begin()
model = ours("multilingual", folder)
# not above what was there before: most of that growth is what upstream's constructors compute, whatever the weights
above = status("VmHWM") - status("VmRSS")
print(json.dumps([writing, above, sum(tensor.nbytes for tensor in weights(model).values())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_neither_writing_nor_loading_holds_the_original(saved, quantized, tmp_path):
    require("multilingual")
    folders = (saved("english"), quantized("multilingual"), tmp_path / "new")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-W", "ignore", "-c", GROWTH, *map(str, folders)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    writing, above, loaded = json.loads(done.stdout.splitlines()[-1])
    assert writing < 0.25 * sum(path.stat().st_size for path in folders[0].glob("*.safetensors"))
    assert sum(path.stat().st_size for path in saved("multilingual").iterdir()) > 1.3 * loaded
    assert above < 0.3 * loaded


def test_quantizing_takes_what_the_hub_has_cached(saved, monkeypatch, tmp_path):
    in_cache(monkeypatch, tmp_path / "hub", saved("english"), "ResembleAI/chatterbox")
    with synthetic.architecture("tiny"):
        turbo.quantize("english", tmp_path / "new", strategy="aggressive")
    assert ours("english", tmp_path / "new").conds is not None
