"""Vocos that cannot be had: contradictions, bad checkpoints, a package or a repository that is not there."""

from __future__ import annotations

import sys

import pytest
import vocos_tools
from snapshots import difference, snapshot
from vocos_tools import altered, settings

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidConfigError, ModelUnavailableError, UnavailablePassError
from chatterbox_turbo.runtime.s3gen.vocos_checkpoint import NAME, WEIGHTS

network, checkpoint, config = vocos_tools.network, vocos_tools.checkpoint, vocos_tools.config


@pytest.mark.parametrize(
    ("vocoder", "fidelity", "said"),
    [
        ({"kind": "vocos"}, "lossy", "vocoder.checkpoint is not set"),
        ({"kind": "vocos", "checkpoint": ""}, "lossy", "vocoder.checkpoint is not set"),
        ({"checkpoint": "folder"}, "lossy", 'vocoder.kind is "hift"'),
        ({"kind": "vocos", "checkpoint": "folder", "enabled": False}, "lossy", "vocoder.enabled is false"),
        ({"kind": "vocos", "checkpoint": "folder"}, "exact", 'lossy, above the ceiling fidelity = "exact"'),
        ({"kind": "vocos", "checkpoint": "folder"}, "numerical", "above the ceiling"),
        ({"kind": "bigvgan"}, "lossy", "vocos"),
    ],
)
def test_configurations_that_contradict_themselves(vocoder, fidelity, said):
    with pytest.raises(InvalidConfigError, match=said):
        turbo.OptimizationConfig(fidelity=fidelity, vocoder=vocoder)


@pytest.fixture
def own(checkpoint, tmp_path):
    """A checkpoint that may be damaged."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in (NAME, WEIGHTS):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return folder


def flip(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: altered(folder, lambda c: c["mel"].update(bands=100)), r"bands +80 +100 +<- differs"),
        (lambda folder: altered(folder, lambda c: c["architecture"].update(layers=1)), "does not fit VocosNetwork"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"cut"), "It is cut off"),
        (flip, "is damaged"),
        (lambda folder: (folder / NAME).unlink(), "no vocoder checkpoint"),
    ],
)
def test_a_bad_checkpoint_leaves_the_model_as_it_was(english, own, damage, said):
    before = snapshot(english)
    damage(own)
    with pytest.raises(ModelUnavailableError, match=said):
        turbo.apply(english, settings(own))
    assert not hasattr(english, "turbo") and difference(before, snapshot(english)) == []


def test_without_the_package_it_is_skipped_or_refused(english, config, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "vocos", None)
    for name in [name for name in sys.modules if name.startswith("vocos.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UnavailablePassError, match=r"vocos is not installed; Run: pip install"):
        turbo.apply(english, config)
    step = turbo.inspect(english, settings(checkpoint, vocoder={"enabled": "auto"})).step("vocoder")
    assert step.status == "skipped" and "pip install" in step.reason


def test_unknown_mel_frames_are_a_reason(english, config, monkeypatch):
    monkeypatch.setattr(english.s3gen, "mel_extractor", lambda samples: samples)
    with pytest.raises(UnavailablePassError, match="mel frames is not a known one"):
        turbo.apply(english, config)


@pytest.mark.usefixtures("no_hub")
def test_a_repository_that_cannot_be_had_is_named(english):
    with pytest.raises(ModelUnavailableError, match=r"(?s)somebody/vocos-s3gen.*Connect to the hub once"):
        turbo.apply(english, settings("somebody/vocos-s3gen"))
    with pytest.raises(ModelUnavailableError, match="a repository of the hub"):
        turbo.apply(english, settings("/no/such/folder"))


def test_a_repository_is_asked_for_two_files_and_for_the_weights_last(english, own, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(list(allow_patterns))
        return str(own)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    turbo.apply(english, settings("somebody/vocos-s3gen"))
    assert asked == [[NAME], [NAME, WEIGHTS]]
    turbo.revert(english)
    asked.clear()
    altered(own, lambda content: content["mel"].update(bands=100))
    with pytest.raises(ModelUnavailableError, match="differs"):
        turbo.apply(english, settings("somebody/vocos-s3gen"))
    assert asked == [[NAME]]
