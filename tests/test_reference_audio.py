"""Recordings of all kinds, to the bit as upstream reads them, and bad ones, which leave the old voice."""

from __future__ import annotations

import base64
import io
import re
import traceback
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cases import FAMILIES, speak
from recordings import EXACT, RATE, differences, encode, voice_of, wav

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import ReferenceAudioError, ReferenceAudioMissingError, TurboError
from chatterbox_turbo.runtime.voice import reference_audio
from chatterbox_turbo.upstream.families import identify

RECORDINGS = ("own rate", "8 kHz", "96 kHz stereo 24 bit", "44.1 kHz float", "Ogg Vorbis", "silence", "silent ends",
              "60 s", "odd length", "0.1 s")  # fmt: skip


def recording(name, samples):
    stereo = np.stack([samples, np.roll(samples, 300) * 0.7], 1)
    return {
        "own rate": lambda: wav(samples),
        "8 kHz": lambda: wav(samples[::3], 8000),
        "96 kHz stereo 24 bit": lambda: wav(np.repeat(stereo, 4, 0), 96_000, subtype="PCM_24"),
        "44.1 kHz float": lambda: wav(samples, 44_100, subtype="FLOAT"),
        "Ogg Vorbis": lambda: wav(samples, 22_050, format="OGG", subtype="VORBIS"),
        "silence": lambda: wav(np.zeros(6 * RATE, np.float32)),
        "silent ends": lambda: wav(np.concatenate([np.zeros(RATE), samples[: 6 * RATE], np.zeros(RATE)])),
        "60 s": lambda: wav(np.tile(samples, 6)[: 60 * RATE]),
        "odd length": lambda: wav(samples[:121_111]),
        "0.1 s": lambda: wav(samples[RATE : RATE + 2400]),
    }[name]()


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_voice_is_upstreams_to_the_bit(kept, monkeypatch, samples, family, name):
    model = kept(family)
    if family == "turbo" and name == "0.1 s":
        pytest.skip("Turbo takes more than 5 s")
    with monkeypatch.context() as patch:
        if family == "turbo":  # with NumPy 2 upstream fails on its own float64
            loud = model.norm_loudness
            patch.setattr(model, "norm_loudness", lambda x, rate: loud(x, rate).astype(np.float32), raising=False)
        encode(model, recording(name, samples))
    expected = voice_of(model)
    turbo.apply(model, EXACT)
    encode(model, recording(name, samples))
    assert differences(voice_of(model), expected) == []


def bad_files(samples, folder):
    (folder / "text.wav").write_text("This is no audio.")
    return {
        "empty": (wav(samples[:0]), "no samples"),
        "0.01 s": (wav(samples[:240]), "0.01 s long"),
        "NaN": (wav(np.where(np.arange(len(samples)) == 5, np.nan, samples), subtype="FLOAT"), "not finite"),
        "infinite": (wav(samples / np.float32(0), subtype="FLOAT"), "not finite"),
        "not audio": (str(folder / "text.wav"), "not audio"),
        "bytes that are not audio": (io.BytesIO(b"RIFF, or so"), "not audio"),
        "no bytes": (io.BytesIO(), "not audio"),
        "missing": (str(folder / "none.wav"), "There is no"),
        "a folder": (folder, "the folder .*Is a directory"),
        "a number": (5.0, "is 5.0, which cannot be read"),
        "text file": (io.StringIO("abc"), "cannot be read.*text mode"),
    }


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_audio_is_told_and_leaves_the_old_voice(kept, samples, tmp_path, family):
    model = kept(family)
    turbo.apply(model, EXACT)
    encode(model, wav(samples))
    own, expected = identify(model).voice, voice_of(model)
    for name, (file, words) in bad_files(samples, tmp_path).items():
        with pytest.raises(ReferenceAudioError, match=words) as caught:
            encode(model, file)
        assert isinstance(caught.value, TurboError) and caught.value.remedy, name
        assert identify(model).voice is own and differences(voice_of(model), expected) == []
    if family == "turbo":
        with pytest.raises(ReferenceAudioError, match="more than 5 s"):
            encode(model, wav(samples[: 5 * RATE]))
    with pytest.raises(FileNotFoundError, match=r"none\.wav") as caught:  # what upstream's callers may catch
        encode(model, str(tmp_path / "none.wav"))
    assert isinstance(caught.value, ReferenceAudioMissingError) and str(caught.value).startswith("There is no")
    assert torch.isfinite(speak(model)).all()


class Upload:
    """A file whose ``read`` is asynchronous, as FastAPI's ``UploadFile``."""

    async def read(self):
        return b""


def misgiven(samples, folder):
    """What callers have passed in place of a path: what it is called, and what is advised."""
    content = wav(np.tile(samples, 3)).getvalue()
    text = base64.b64encode(content).decode()
    tensor = torch.from_numpy(samples)
    memory = r"soundfile\.write\(file, samples"
    return {
        "bytes": (content, r"is [\d,]+ bytes,", r"io\.BytesIO\(data\)"),
        "bytearray": (bytearray(content), r"is [\d,]+ bytes,", r"io\.BytesIO\(data\)"),
        "few bytes": (content[:300], r"is 300 bytes,", r"io\.BytesIO\(data\)"),
        "base64": (text, r"is base64 text \([\d,]+ characters\),", r"b64decode\(text\)"),
        "short base64": (text[:200], r"is base64 text \(200 characters\),", r"b64decode\(text\)"),
        "data URI": (f"data:audio/wav;base64,{text}", r"is a data URI \([\d,]+ characters\),", "partition"),
        "URL": (f"https://example.org/{'a' * 300}.wav", r"is a URL \(.*…", "Download it"),
        "text": ("Hello there. " * 5000, r"is 'Hello there\..*… \(65,000 characters\)", "path of an audio file"),
        "array": (samples, r"is a NumPy array of shape \(\d+,\),", memory),
        "tensor": (tensor, r"is a tensor of shape \(\d+,\),", memory + ".*cpu"),
        "Gradio": ((RATE, samples), "is a tuple of rate and samples, as Gradio gives,", "type='filepath'"),
        "ComfyUI": ({"waveform": tensor[None, None], "sample_rate": RATE}, "as ComfyUI gives,", memory),
        "dict": ({"path": "voice.wav", "data": text}, r"is a dict with \['path', 'data'\],", "path"),
        "list": (list(samples[:9]), "is a list of 9,", "path"),
        "folder": (folder, "is the folder ", "file in it"),
        "upload": (Upload(), "asynchronous", "file"),
        "pathlib": (Path("none" * 80) / "none.wav", "reference audio .*…", "path"),
    }


@pytest.mark.parametrize("family", ["english", "vc"])
def test_what_is_no_file_is_named_with_what_to_pass(kept, samples, tmp_path, family):
    model = kept(family)
    turbo.apply(model, EXACT)
    voice, name = identify(model).voice, "target_voice_path" if family == "vc" else "audio_prompt_path"
    for title, (given, words, remedy) in misgiven(samples, tmp_path).items():
        for call in (lambda: encode(model, given), lambda: speak(model, **{name: given})):  # noqa: B023
            with pytest.raises(ReferenceAudioError, match=words) as caught:
                call()
            message = "".join(traceback.format_exception(caught.value))  # with what it is raised from
            assert re.search(remedy, caught.value.remedy), title
            assert len(str(caught.value)) < 500 and len(message) < 6000, title
    for given, words in ((None, "is None,"), ("", "is an empty string,")):
        with pytest.raises(ReferenceAudioError, match=words + ".*leave the argument out"):
            encode(model, given)
        speak(model, **{name: given})  # upstream's way to keep the voice
    assert identify(model).voice is voice


def test_a_batch_names_it_too(english, samples):
    turbo.apply(english, {"preset": "exact", "decoding": {"progress": "off"}})
    voice, english.conds = english.conds, None
    try:
        with pytest.raises(ReferenceAudioError, match="is a NumPy array"):
            english.turbo.batch([{"text": "Hello.", "audio_prompt_path": samples}])
    finally:
        english.conds = voice


def test_formats_that_libsndfile_does_not_know(monkeypatch, samples, tmp_path):
    """Read by audioread, as librosa does; here a WAV that libsndfile is kept from."""
    path = tmp_path / "voice.wav"
    path.write_bytes(wav(np.stack([samples, samples / 2], 1), 16_000, subtype="PCM_16").getvalue())
    expected, rate = soundfile.read(path, dtype="float32")

    def unknown(*args, **kwargs):
        raise soundfile.LibsndfileError(1)

    monkeypatch.setattr(soundfile, "SoundFile", unknown)
    reference = reference_audio.Reference(b"", "'voice.wav'", path.read_bytes(), path)
    found = reference.samples(16_000, reference_audio.resample)
    assert np.array_equal(found, expected.T.mean(axis=0)) and rate == 16_000
    path.write_bytes(b"still no audio")
    with pytest.raises(ReferenceAudioError, match="not audio"):
        reference.samples(16_000, reference_audio.resample)
