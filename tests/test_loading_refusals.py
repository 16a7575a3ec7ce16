"""What `load` says of checkpoints that will not do, of forks that it does not know, and of the hub."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from chatterbox.models.voice_encoder import VoiceEncoder
from loading_tools import assert_equal, in_cache, ours, read, upstreams
from safetensors.torch import load_file, save_file
from test_synthetic import INSTALLED, has
from torch import nn

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import ModelUnavailableError, SlowLoadingWarning
from chatterbox_turbo.runtime.loading import construction
from chatterbox_turbo.runtime.loading.mapped_files import MappedFiles
from chatterbox_turbo.upstream.loading import family_in, is_cached, key_file, model_class

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


# --- checkpoints that do not do


def edited(path: Path, edit) -> None:
    tensors = read(path)
    edit(tensors)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def cut(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def replaced(content: bytes):
    return lambda path: path.write_bytes(content)


def without(name: str):
    return lambda path: edited(path, lambda tensors: tensors.pop(name))


def with_another(name: str, tensor: torch.Tensor):
    return lambda path: edited(path, lambda tensors: tensors.update({name: tensor}))


HEAD = "speech_head.weight"
BAD = [
    ("english", "t3_cfg.safetensors", Path.unlink, r"There is no t3_cfg.safetensors in .*lacks a file.*Download"),
    ("english", "s3gen.safetensors", Path.unlink, r"There is no s3gen.safetensors"),
    ("english", "tokenizer.json", Path.unlink, r"Cannot load ChatterboxTTS \(English\) from .*lacks a file"),
    ("english", "ve.safetensors", cut(0.9), r"Cannot read .*ve.safetensors: .*truncated.*Download it again"),
    ("english", "ve.safetensors", cut(0.0), r"Cannot read .*ve.safetensors"),
    ("english", "t3_cfg.safetensors", replaced(b"<html>404</html>"), r"Cannot read .*t3_cfg.safetensors"),
    ("english", "t3_cfg.safetensors", without(HEAD), rf"t3_cfg.safetensors does not fit T3.*Missing.*{HEAD}"),
    ("english", "t3_cfg.safetensors", with_another("odd", torch.ones(1)), r"does not fit T3.*Unexpected.*odd"),
    ("english", "t3_cfg.safetensors", with_another(HEAD, torch.ones(3, 3)), rf"size mismatch for {HEAD}.*\[3, 3\]"),
    ("english", "s3gen.safetensors", without("flow.spk_embed_affine_layer.bias"), r"missing: flow.spk_embed_affine"),
    ("english", "conds.pt", cut(0.5), r"Cannot load ChatterboxTTS"),
    ("vc", "s3gen.safetensors", Path.unlink, r"There is no s3gen.safetensors"),
    ("multilingual", "ve.pt", Path.unlink, r"There is no ve.pt"),
    ("multilingual", "s3gen.pt", cut(0.9), r"Cannot read .*s3gen.pt: .*truncated"),
    ("multilingual", "s3gen.pt", cut(0.0), r"Cannot read .*s3gen.pt"),
    ("multilingual", "s3gen.pt", replaced(b"no checkpoint"), r"Cannot read .*s3gen.pt"),
    ("multilingual", "ve.pt", without("proj.bias"), r"ve.pt does not fit VoiceEncoder.*Missing.*proj.bias"),
    ("turbo", "s3gen_meanflow.safetensors", with_another("odd", torch.ones(1)), r"Unexpected.*odd"),
    ("turbo", "tokenizer_config.json", replaced(b"{"), r"Cannot load ChatterboxTurboTTS"),
]


@pytest.mark.parametrize(
    ("family", "name", "damage", "message"),
    BAD,
    ids=[f"{family}-{name}-{n}" for n, (family, name, *_) in enumerate(BAD)],
)
def test_a_bad_checkpoint_is_explained(copy, family, name, damage, message):
    if not has(family):
        pytest.skip(f"the installed chatterbox-tts has no {family} model")
    folder = copy(family)
    damage(folder / name)
    state = torch.get_rng_state()
    with pytest.raises(ModelUnavailableError, match=f"(?s){message}") as caught:
        ours(family, folder)
    assert len(str(caught.value)) < 1500
    if "tokenizer" not in name and name != "conds.pt":  # where upstream's own is tried as well, it draws
        assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_of_another_size_is_explained_in_few_words(saved):
    with pytest.raises(ModelUnavailableError, match=r"does not fit T3.*and \d+ more") as caught:
        turbo.load("english", "cpu", folder=saved("english"))
    assert len(str(caught.value)) < 1500


def test_a_missing_folder(tmp_path):
    with pytest.raises(ModelUnavailableError, match=r"There is no folder .*none"):
        turbo.load("english", "cpu", folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_gpu_without_memory_is_not_taken_for_a_bad_checkpoint(saved, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MappedFiles, "place", full)
    with pytest.raises(torch.OutOfMemoryError):
        ours("english", saved("english"))


# --- forks and other releases


class _Fork:
    """Methods that a fork might have."""

    def by_another_way(cls, ckpt_dir, device):
        model, encoder = upstreams("english", ckpt_dir), VoiceEncoder()
        for name, tensor in read(ckpt_dir / "ve.safetensors").items():
            encoder.state_dict()[name].copy_(tensor)
        model.ve = encoder.to(device).eval()
        return model

    def by_type(cls, ckpt_dir, device):
        assert isinstance(VoiceEncoder(), VoiceEncoder)
        return upstreams("english", ckpt_dir)

    def by_other_names(cls, ckpt_dir, device):
        return upstreams("english", ckpt_dir)


@pytest.mark.parametrize("way", ["by_another_way", "by_type", "by_other_names"])
def test_what_is_unknown_is_loaded_by_upstreams_own(saved, way):
    fork = type("Fork", (model_class("english"),), {"from_local": classmethod(vars(_Fork)[way])})
    with pytest.warns(SlowLoadingWarning, match="Fork was loaded by upstream's own"):
        loaded = turbo.load(fork, "cpu", folder=saved("english"), optimize=False)
    assert_equal(upstreams("english", saved("english")), loaded)


def test_weights_that_a_fork_transforms(saved):
    def from_local(cls, ckpt_dir, device):
        tensors = load_file(ckpt_dir / "ve.safetensors")
        tensors["proj.weight"] = tensors["proj.weight"] * 2
        tensors["proj.bias"].add_(1)
        encoder = VoiceEncoder()
        encoder.load_state_dict(tensors)
        return encoder

    fork = type("Fork", (), {"from_local": classmethod(from_local)})
    loaded, file = ours(fork, saved("english")), read(saved("english") / "ve.safetensors")
    assert torch.equal(loaded.proj.weight, file["proj.weight"] * 2)
    assert torch.equal(loaded.proj.bias, file["proj.bias"] + 1)
    assert torch.equal(loaded.lstm.weight_hh_l0, file["lstm.weight_hh_l0"])


def test_modules_that_cannot_be_filled_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.other.weight = self.one.weight

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.kept = [self.layer.weight]

    with pytest.raises(construction.UnfamiliarConstructionError, match="shares parameters"):
        construction.construct(Tied)
    state = Keeping().state_dict()
    with pytest.raises(construction.UnfamiliarConstructionError, match="kept"):
        construction.fill(construction.construct(Keeping), state, MappedFiles(), torch.device("cpu"))


# --- the hub


@pytest.mark.parametrize("family", INSTALLED)
def test_from_the_cache_as_from_a_folder(saved, monkeypatch, tmp_path, family):
    repository = {"turbo": "-turbo", "nano": "-nano"}.get(family, "")
    folder = in_cache(monkeypatch, tmp_path, saved(family), f"ResembleAI/chatterbox{repository}")
    assert_equal(upstreams(family, folder), ours(family, None))


def test_files_of_one_by_one_are_fetched_together(saved, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def snapshot(repo_id, **options):
        asked.append((repo_id, sorted(options["allow_patterns"])))
        return str(saved("english"))

    in_cache(monkeypatch, tmp_path, saved("english"), "ResembleAI/chatterbox")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    ours("english", None)
    files = ["conds.pt", "s3gen.safetensors", "t3_cfg.safetensors", "tokenizer.json", "ve.safetensors"]
    assert asked == [("ResembleAI/chatterbox", files)]


def test_no_cache_and_no_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailableError, match=r"Cannot load ChatterboxTTS \(English\) from the hub.*Connect"):
        turbo.load("english", "cpu")


def test_the_command_loads_the_same_way(copy, capsys, tmp_path):
    from chatterbox_turbo.cli import main

    folder = copy("english")
    cut(0.9)(folder / "ve.safetensors")
    arguments = ["say", "hi", "--checkpoint", str(folder), "--size", "tiny", "-o", str(tmp_path / "out.wav")]
    assert main(arguments) == 1
    assert "Cannot read" in capsys.readouterr().err and not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("name", ["t3_23lang.safetensors", "t3_mtl23ls_v2.safetensors"])
def test_multilingual_weights_are_cached_where_they_are_those_that_the_installed_release_reads(
    monkeypatch, tmp_path, name
):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / name).touch()
    (tmp_path / "old" / "s3gen.safetensors").touch()
    assert family_in(tmp_path / "old") == "multilingual"
    assert not is_cached("multilingual")
    in_cache(monkeypatch, tmp_path, tmp_path / "old", "ResembleAI/chatterbox")
    read = name in inspect.getsource(model_class("multilingual").from_local)
    assert is_cached("multilingual") == read and not is_cached("english")
    assert (key_file("multilingual")[1] == name) == read
