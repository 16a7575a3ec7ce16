"""Quantized folders that will not do, and quantizing that cannot be done or is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import quantized_tools
import torch
from cases import require
from loading_tools import ours, read
from quantized_tools import NAME, linked, quantize
from safetensors.torch import save_file

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import InvalidRequestError, ModelUnavailableError, TurboError
from chatterbox_turbo.runtime.loading.new_folder import fcntl
from chatterbox_turbo.upstream import quantized_writer

quantized = quantized_tools.quantized
pytestmark = pytest.mark.usefixtures("nothing_global_changes")


@pytest.fixture
def damaged(quantized, tmp_path):
    """The files of English, for replacing some."""
    return linked(quantized("english"), tmp_path / "linked")


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
