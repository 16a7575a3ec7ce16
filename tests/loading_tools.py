"""What the tests of loading share: comparing two models in everything, and loading one either way."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from test_synthetic import OPTIONS, everything_patched
from torch import nn

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import SlowLoadingWarning
from chatterbox_turbo.upstream.loading import model_class


def global_state() -> tuple:
    """Defaults, initialisers, upstream's classes and sizes: what loading must leave as it is."""
    defaults = (torch.get_default_dtype(), torch.get_default_device(), torch.empty(1).device)
    module = {name: value for name, value in vars(nn.Module).items() if name != "smart_apply"}  # Transformers' own
    return defaults, dict(vars(nn.init)), module, dict(vars(nn.Linear)), everything_patched()


def read(path: Path) -> dict[str, torch.Tensor]:
    """Copies: a file must not be written while its tensors are mapped."""
    tensors = torch.load(path) if path.suffix == ".pt" else load_file(path)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def ours(source, folder, **options):
    """Loaded by this package without a word, not optimized."""
    with synthetic.architecture("tiny"), warnings.catch_warnings():
        warnings.simplefilter("error", SlowLoadingWarning)
        return turbo.load(source, "cpu", folder=folder, optimize=False, **options)


def upstreams(family, folder):
    with synthetic.architecture("tiny"):
        return model_class(family).from_local(folder, "cpu", **OPTIONS.get(family, {}))


def differences(one, other, path="model", seen=None) -> list[str]:
    """Everything that tells two objects apart: types, attributes and their order, tensors to the bit and stride."""
    seen = set() if seen is None else seen
    kinds = [(type(o).__module__, type(o).__qualname__) for o in (one, other)]
    if kinds[0] != kinds[1]:
        return [f"{path}: {kinds[0]} and {kinds[1]}"]
    if isinstance(one, str | int | float | bool | None | torch.dtype | torch.device):
        return [] if one == other else [f"{path}: {one!r} and {other!r}"]
    if (id(one), id(other)) in seen:
        return []
    seen.add((id(one), id(other)))
    if isinstance(one, torch.Tensor):
        kinds = [(t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.is_leaf) for t in (one, other)]
        if kinds[0] != kinds[1]:
            return [f"{path}: {kinds[0]} and {kinds[1]}"]
        return [] if torch.equal(one, other) else [f"{path}: values"]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [path]
    if isinstance(one, dict) and "hooks" in path.rsplit(".", 1)[-1]:
        one, other = list(one.values()), list(other.values())  # under numbers that go up from module to module
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{path}: keys {list(one)} and {list(other)}"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}.{key}", seen)]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: lengths"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for index, pair in pairs for d in differences(*pair, f"{path}[{index}]", seen)]
    if hasattr(one, "__dict__") and not isinstance(one, type) and not hasattr(one, "__code__"):
        return differences(vars(one), vars(other), path, seen)
    return []


def assert_equal(theirs, loaded) -> None:
    """No differences but for noise that releases up to 0.1.5 draw anew whenever a model is built."""
    decoders = [model.s3gen.flow.decoder for model in (theirs, loaded) if hasattr(model, "s3gen")]
    if all(hasattr(decoder, "rand_noise") for decoder in decoders):
        decoders[0].rand_noise = decoders[1].rand_noise
    assert differences(theirs, loaded) == []


def weights(model) -> dict[str, torch.Tensor]:
    return {
        f"{p}.{k}": v
        for p in ("t3", "s3gen", "ve")
        if hasattr(model, p)
        for k, v in getattr(model, p).state_dict().items()
    }


def in_cache(monkeypatch, folder: Path, saved: Path, repository: str) -> Path:
    """A Hugging Face cache with one checkpoint, and no network; the folder of the checkpoint."""
    from huggingface_hub import constants

    repository = folder / f"models--{repository.replace('/', '--')}"
    snapshot = Path(shutil.copytree(saved, repository / "snapshots" / "0123"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot
