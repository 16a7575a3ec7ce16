"""Vocos checkpoints: written and read back to the bit, and what is said of those that cannot be read."""

from __future__ import annotations

import builtins
import pickle
import sys
from dataclasses import asdict, replace
from importlib import import_module

import pytest
import torch
from vocos_tools import MEL, SMALL, altered

from chatterbox_turbo.errors import InvalidRequestError, ModelUnavailableError
from chatterbox_turbo.runtime.loading.hub_folder import folder_of
from chatterbox_turbo.runtime.s3gen import vocos_checkpoint
from chatterbox_turbo.runtime.s3gen.vocos_checkpoint import NAME, WEIGHTS, check_mel, load, read_description, write
from chatterbox_turbo.runtime.s3gen.vocos_network import MelDescription, build, why_not_installed
from chatterbox_turbo.upstream import mel_frames

# what the published checkpoint for 24 kHz was trained on
PUBLIC = MelDescription(24000, 100, 256, 1024, 1024, 0.0, 12000.0, "e", 1e-7, True, "reflect", 1.0, "htk", "none")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(5)
    return build(SMALL, MEL)


@pytest.fixture
def folder(network, tmp_path):
    write(tmp_path / "vocoder", network, {"log-mel distance": 0.25, "SNR dB": 11.5}, {"steps": 300})
    return tmp_path / "vocoder"


def refusal(folder, function=load) -> str:
    with pytest.raises(ModelUnavailableError) as caught:
        function(folder)
    return str(caught.value)


def test_it_gives_as_many_samples_as_hift(network):
    for frames in (1, 2, 7):
        assert network(torch.randn(2, 80, frames)).shape == (2, 480 * frames)


def test_the_description_of_mel_frames_is_upstreams(english):
    assert mel_frames.describe(english.s3gen) == MEL
    english.s3gen.mel_extractor, own = (lambda samples, n_fft=512: samples), english.s3gen.mel_extractor
    try:
        assert mel_frames.describe(english.s3gen) is None
    finally:
        english.s3gen.mel_extractor = own


def test_what_is_written_is_read_to_the_bit(network, folder):
    state = torch.get_rng_state()
    found, mel = load(folder), torch.randn(1, 80, 5)
    torch.set_rng_state(state)
    assert torch.equal(found(mel), network(mel))
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert {p.name for p in folder.iterdir()} == {NAME, WEIGHTS}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    described = read_description(folder)
    assert (described.architecture, described.mel) == (SMALL, MEL)
    assert described.training == {"steps": 300}
    assert described.figures() == "by the checkpoint's own validation: log-mel distance 0.25, SNR dB 11.5"
    assert "no figures" in replace(described, validation={}).figures()
    assert not found.head.istft.window.is_meta and torch.equal(found.head.istft.window, torch.hann_window(1920))


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(network, folder, tmp_path):
    with pytest.raises(InvalidRequestError, match="exists already"):
        write(folder, network)
    with pytest.raises(InvalidRequestError, match="no folder"):
        write(tmp_path / "missing" / "vocoder", network)
    for bad in ({"SNR": float("nan")}, {"SNR": "high"}):
        with pytest.raises(InvalidRequestError, match="cannot be written"):
            write(tmp_path / "other", network, bad)
    assert [path.name for path in tmp_path.iterdir()] == ["vocoder"]


def test_another_mel_is_refused_with_both_side_by_side(folder):
    (folder / WEIGHTS).unlink()  # nothing of the weights is looked at
    altered(folder, lambda content: content.update(mel=asdict(replace(PUBLIC, hop=480))))
    with pytest.raises(ModelUnavailableError) as caught:
        check_mel(read_description(folder), MEL, folder)
    lines = str(caught.value).splitlines()
    rows = {line.split()[0]: line for line in lines if "  " in line}
    assert rows["bands"].split() == ["bands", "80", "100", "<-", "differs"]
    assert rows["floor"].split() == ["floor", "1e-05", "1e-07", "<-", "differs"]
    assert rows["log"].split() == ["log", "e", "e"]
    check_mel(replace(read_description(folder), mel=MEL), MEL, folder)


def test_another_architecture_than_the_weights_is_refused(folder):
    altered(folder, lambda content: content["architecture"].update(layers=3))
    assert "does not fit VocosNetwork" in (said := refusal(folder)) and "convnext.2" in said
    altered(folder, lambda content: content["architecture"].update(layers=2, dim=64))
    assert "size mismatch" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["architecture"].update(adanorm_num_embeddings=4), "unknown 'adanorm_num_embeddings'"),
        (lambda c: c["architecture"].update(padding="center"), "hop samples for each frame"),
        (lambda c: c["architecture"].update(hop=256), "256 samples of a mel frame, and one frame is 480"),
        (lambda c: c["architecture"].update(n_fft=480), "do not overlap evenly"),
        (lambda c: c["architecture"].update(layers=0), "layers is 0"),
        (lambda c: c["architecture"].update(layers=257), "layers is 257, expected: 1 to 256"),
        (lambda c: c["architecture"].update(dim=10**9), "dim is 1,000,000,000"),
        (lambda c: c["architecture"].update(dim="512"), "dim is '512', expected: int"),
        (lambda c: c["mel"].update(centre=1), "centre is 1, expected: bool"),
        (lambda c: c["mel"].pop("bands"), "bands"),
        (lambda c: c.update(class_path="os.system"), "unknown: 'class_path'"),
        (lambda c: c.update(validation={"SNR": "ten"}), "figure 'SNR' is 'ten'"),
        (lambda c: c.pop("files"), "'files' is missing"),
        (lambda c: c.update(version=2), "Install a newer chatterbox_turbo"),
        (lambda c: c.update(version="one"), "version is 'one'"),
        (lambda c: c.update(format="other"), "does not describe a vocoder"),
    ],
)
def test_a_description_of_something_else_is_refused(folder, change, said):
    assert said in refusal(altered(folder, change), read_description)


def test_what_is_cut_off_or_damaged_is_refused(folder):
    weights, content = folder / WEIGHTS, (folder / WEIGHTS).read_bytes()
    weights.write_bytes(content[:-100])
    assert "It is cut off" in refusal(folder)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged" in refusal(folder)
    weights.unlink()
    assert f"lacks {WEIGHTS}" in refusal(folder)
    (folder / NAME).write_text((folder / NAME).read_text()[:-40])
    assert "truncated or damaged" in refusal(folder)


@pytest.mark.parametrize("name", ["~nosuchuser/x", 5000 * "long", "a\0b"])
def test_names_that_are_no_paths_are_refused(name):
    assert refusal(name, lambda given: folder_of(given, [])).startswith("There is no folder")


def test_foreign_folders_are_told_apart(tmp_path):
    assert "There is no folder" in refusal(tmp_path / "nowhere")
    assert f"it lacks {NAME}" in (said := refusal(tmp_path)) and "It has" not in said
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "It has pytorch_model.bin" in refusal(tmp_path)


class Code:
    """What runs where somebody unpickles it."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.was_run = True",)


def test_no_code_of_a_checkpoint_is_run(folder):
    pickled = pickle.dumps(Code())
    (folder / WEIGHTS).write_bytes(pickled)
    described = read_description(folder)
    facts = {"bytes": len(pickled), "sha256": vocos_checkpoint.digest(folder / WEIGHTS)}
    altered(folder, lambda content: content["files"].update({WEIGHTS: facts}))
    assert "Cannot read" in refusal(folder)
    assert described.architecture == SMALL and not hasattr(builtins, "was_run")


def test_a_missing_package_is_named_with_the_way_to_get_it(folder, monkeypatch):
    assert why_not_installed() == ""
    monkeypatch.setitem(sys.modules, "vocos", None)
    for name in [name for name in sys.modules if name.startswith("vocos.")]:
        monkeypatch.delitem(sys.modules, name)
    said = refusal(folder)
    assert "vocos is not installed" in said and 'pip install "chatterbox-turbo[vocos]"' in said
    assert "pip install" in why_not_installed()


def test_the_package_is_not_imported_before_it_is_needed(tmp_path):
    import subprocess

    code = (
        "import sys; from chatterbox_turbo.runtime.s3gen import vocos_checkpoint; import chatterbox_turbo.passes;"
        "print([m for m in ('vocos', 'encodec') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert import_module("vocos").__version__
