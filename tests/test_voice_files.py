"""Files of named voices: the same voices again, for families that they fit; files of something else."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
import voice_tools
from cases import FAMILIES, SPEAKING, speak
from voice_tools import own_of, stored

from chatterbox_turbo.errors import InvalidRequestError, VoiceFileError
from chatterbox_turbo.upstream import voice_files

higher, two = voice_tools.higher, voice_tools.two


def damaged(path, change):
    """The file with its header changed, or its bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"][voice_files.KEY])
    body = change(header, about) or data[8 + size :]
    if voice_files.KEY in header["__metadata__"]:
        header["__metadata__"][voice_files.KEY] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_the_voices(two, tmp_path, family):
    model = two(family)
    voices = model.turbo.voices
    spoken = speak(model, 1, voice="low")
    assert voices.save(tmp_path / "new" / "folder") == ["low", "high"]
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["high.safetensors", "low.safetensors"]
    before = {name: voices._find(name) for name in voices}
    written = [path.stat().st_mtime_ns for path in folder.iterdir()]
    assert voices.save(folder) == ["low", "high"] and [p.stat().st_mtime_ns for p in folder.iterdir()] == written
    assert voices.load(folder) == ["high", "low"], "equal ones are no obstacle"
    voices.remove("low")
    assert voices.load(folder, ["low"]) == ["low"] and torch.equal(speak(model, 1, voice="low"), spoken)
    for name, one in before.items():
        again = voices._find(name)
        assert again.digest == one.digest and again.summary() == one.summary()
    path = voices.export("low", tmp_path)
    assert path == tmp_path / "low.safetensors"
    assert voices.import_(path, as_="third") == "third" and torch.equal(speak(model, 1, voice="third"), spoken)
    with pytest.raises(VoiceFileError, match="holds another voice"):
        voices.export("high", path)
    assert voices.export("high", path, replace=True) == path
    with pytest.raises(VoiceFileError, match=r"low.safetensors.* holds another voice"):
        voices.save(tmp_path)
    assert not (tmp_path / "high.safetensors").exists(), "nothing is written then"
    with pytest.raises(InvalidRequestError, match="a voice 'low' already"):
        voices.load(tmp_path)
    assert voices.load(tmp_path, replace=True) == ["low"]
    assert voices._find("low").digest == before["high"].digest


def test_files_that_are_no_voices(two, tmp_path, voice):
    model = two("english")
    voices = model.turbo.voices
    voices.export("low", tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"

    def foreign(header, about):
        del header["__metadata__"][voice_files.KEY]

    def future(header, about):
        about["version"] = 2

    def family(header, about):
        about["family"] = "klingon"

    def flipped(header, about):
        return good[8 + int.from_bytes(good[:8], "little") :][:-1] + b"\xff"

    for made, said in (
        (b"", "not a safetensors file"),
        (b"RIFF" + bytes(100), "not a safetensors file.*add"),
        (good[:50], "damaged: it ends after 50 bytes"),
        (good[:-100], "damaged"),
        (good[:8] + b"{]" + good[10:], "damaged: its header is no JSON"),
        (foreign, "safetensors file of something else"),
        (future, r"of format 2, and this package reads format 1.*Install a newer"),
        (family, "damaged: its header is wrong about family"),
        (flipped, "damaged"),
    ):
        path.write_bytes(good if callable(made) else made)
        if callable(made):
            damaged(path, made)
        for read in (lambda: voices.import_(path), lambda: voices.load(tmp_path)):
            with pytest.raises(VoiceFileError, match=f"x.safetensors.*{said}"):
                read()
    with path.open("wb") as file:
        file.truncate(voice_files.LARGEST + 1)
    with pytest.raises(VoiceFileError, match="no voice: it has"):
        voices.import_(path)
    path.unlink()
    for wrong, said in (("none", "There is no voice file"), (tmp_path, "not a file")):
        with pytest.raises(VoiceFileError, match=said):
            voices.import_(wrong, as_="x")
    with pytest.raises(VoiceFileError, match="cannot be read: No such file"):
        voices.load(tmp_path / "none")
    with pytest.raises(VoiceFileError, match=r"no voice 'god' in .* \(did you mean 'good'\?\)"):
        voices.load(tmp_path, ["god"])
    (tmp_path / "file").write_text("")
    with pytest.raises(VoiceFileError, match="cannot be made"):
        voices.save(tmp_path / "file")
    with pytest.raises(VoiceFileError, match="cannot be written"):
        voices.export("low", tmp_path / "none" / "x")
    assert voices.list() == ["low", "high"]


def test_a_full_disk_leaves_what_was_there(two, tmp_path, monkeypatch):
    voices = two("english").turbo.voices
    voices.export("low", tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(voice_files.os, "fsync", full)
    with pytest.raises(VoiceFileError, match=r"cannot be written.*No space left"):
        voices.export("high", tmp_path / "x.safetensors", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_families_are_checked(two, tmp_path):
    english = two("english").turbo.voices
    english.save(tmp_path / "english")
    spoken = english._find("low").digest
    multilingual, turbos, vc = (two(family).turbo.voices for family in ("multilingual", "turbo", "vc"))
    turbos.save(tmp_path / "turbo")
    vc.save(tmp_path / "vc")
    for voices in (multilingual, vc):  # upstream publishes one conds.pt for these three
        assert voices.import_(tmp_path / "english" / "low.safetensors", as_="e") == "e"
        assert voices._find("e").digest == spoken and voices.show("e")["family"] == "english"
    for voices, source, said in (
        (english, "turbo", r"a voice of ChatterboxTurboTTS: the encoders and prompts of ChatterboxTTS \(English\)"),
        (turbos, "english", "a voice of ChatterboxTTS"),
        (vc, "turbo", "a voice of ChatterboxTurboTTS"),
        (english, "vc", r"a voice of ChatterboxVC.*no half for T3"),
    ):
        with pytest.raises(VoiceFileError, match=f"does not fit this model.*{said}.*with this model"):
            voices.load(tmp_path / source, replace=True)
    with pytest.raises(InvalidRequestError, match="a voice of ChatterboxTurboTTS"):
        english.add("x", turbos.conditionals("low"))
    with pytest.raises(InvalidRequestError, match="a voice of ChatterboxTTS"):
        turbos.add("x", english.conditionals("low"))
    vc.add("given", english.conditionals("low"))
    vc.blend({"given": 2, "high": 1}, as_="mix")
    assert vc.show("mix")["family"] == "vc" and "t3.speaker_emb" not in stored(vc, "mix")


def test_a_voice_of_english_speaks_for_voice_conversion(two, samples):
    english, vc = two("english"), two("vc")
    vc.turbo.voices.add("e", english.turbo.voices.conditionals("low"))
    given = english.turbo.voices.conditionals("low")
    assert torch.equal(speak(vc, 1, voice="e"), speak(vc, 1, voice=given))


@pytest.mark.parametrize("family", SPEAKING)
def test_what_upstream_saves_imports(two, tmp_path, family):
    model = two(family)
    voices = model.turbo.voices
    own = own_of(model)
    own.save(tmp_path / "conds.pt")
    spoken = speak(model, 1)
    assert voices.import_(tmp_path / "conds.pt") == "conds" and voices.show("conds")["family"] == family
    assert torch.equal(speak(model, 1, voice="conds"), spoken)


class _Opened:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_pickles_of_something_else_are_not_opened(two, tmp_path):
    model = two("english")
    voices = model.turbo.voices
    path = tmp_path / "x.pt"
    good = io.BytesIO()
    torch.save({"t3": vars(voices.conditionals("low").t3), "gen": voices.conditionals("low").gen}, good)
    legacy, huge, plain = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"t3": {}, "gen": {}}, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(huge, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(voice_files.LARGEST + 1))
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("readme.txt", "hello")
    harmful, model_file, state = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"t3": {}, "gen": {}, "x": _Opened()}, harmful)
    torch.save(torch.nn.Linear(2, 2), model_file)
    torch.save(torch.nn.Linear(2, 2).state_dict(), state)
    for content, said in (
        (legacy, "a pickle, which is not opened"),
        (huge, "unpacked it has"),
        (plain, "is not what Conditionals.save writes"),
        (harmful, "more than tensors, and was not unpickled"),
        (model_file, "more than tensors, and was not unpickled"),
        (state, "a dict of t3 and gen"),
        (io.BytesIO(good.getvalue()[:-200]), "is not what Conditionals.save writes"),
    ):
        path.write_bytes(content.getvalue())
        with pytest.raises(VoiceFileError, match=said):
            voices.import_(path)
    path.write_bytes(good.getvalue())
    assert voices.import_(path) == "x"
    with pytest.raises(VoiceFileError, match=r"does not say of which model.*25 speech tokens"):
        voice_files.read_any(path)
    assert voice_files.read_any(path, "english").family == "english"
