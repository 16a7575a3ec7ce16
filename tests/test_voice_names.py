"""Voices that a model keeps by name: what they are made of, what they cost, how long they live; blends."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import soundfile
import torch
import voice_tools
from cases import FAMILIES, speak
from recordings import EXACT, RATE, encode, wav
from voice_tools import WITHOUT, own_of, stored

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import InvalidRequestError, ReferenceAudioError
from chatterbox_turbo.runtime.voice import names
from chatterbox_turbo.upstream.voices import NamedVoice, cleaned, halves

higher, two = voice_tools.higher, voice_tools.two


def test_names_and_what_they_cost(two, samples):
    voices = two("english").turbo.voices
    assert list(voices) == voices.list() == ["low", "high"] and "low" in voices and "x" not in voices
    misses = voices.misses
    voices.add("recorded", wav(samples[: 3 * RATE]))
    assert len(voices) == 1 and voices.misses == misses + 1, "of the recordings that are kept"
    about = voices.show("recorded")
    assert about["family"] == "english" and about["reference_seconds"] == 3.0 and about["prompt_tokens"] == 25
    assert about["source"]["kind"] == "recording" and len(about["source"]["sha256"]) == 64
    voices.clear()
    assert len(voices) == 0 and voices.list() == ["low", "high", "recorded"]
    assert voices.nbytes == voices.named_nbytes == sum(voices.show(name)["bytes"] for name in voices)
    assert "3 named (0.2 of 64.0 MiB)" in str(voices)
    voices.remove("recorded")
    with pytest.raises(InvalidRequestError, match="a voice 'low' already"):
        voices.add("low", wav(samples))
    with pytest.raises(InvalidRequestError, match="differs from it in case alone"):
        voices.add("Low", wav(samples), replace=True)
    with pytest.raises(InvalidRequestError, match="differs from it in case alone"):
        voices.blend({"low": 1}, as_="Low")
    assert "Low" not in voices
    voices.add("low", voices.conditionals("high"), replace=True)
    assert voices.show("low")["source"] == {"kind": "conditionals"}
    voices.remove("low")
    assert voices.list() == ["high"]
    for add in (lambda: voices.add("a/b", wav(samples)), lambda: voices.blend({"high": 1}, as_="../x")):
        with pytest.raises(InvalidRequestError, match="cannot be named"):
            add()
    cafe = "cafe\N{COMBINING ACUTE ACCENT}"
    voices.add(cafe, voices.conditionals("high"))
    assert cafe in voices and "caf\N{LATIN SMALL LETTER E WITH ACUTE}" in voices.list()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "empty"), (" ", "empty"), (3, "text"), ("a/b", "'/'"), ("a\\b", r"'\\\\'"), ("..", "begins with"),
        (".a", "begins with"), ("-a", "begins with"), ("a.", "ends with"), (" a", "space at an end"),
        ("a\0b", "printed"),
        ("a\nb", "printed"), ("a\N{RIGHT-TO-LEFT OVERRIDE}b", "printed"), ("\ud800", "printed"), ("CON", "device"),
        ("nul.txt", "device"), ("com1", "device"), ("a" * 101, "100 characters"), ("é" * 101, "100 characters"),
        ("語" * 80, "200 bytes"), ("a:b", "':'"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_a_files(name, said):
    with pytest.raises(InvalidRequestError, match=f"cannot be named.*{said}"):
        names.checked(name)


def test_bad_audio_and_bad_voices_leave_everything(two, samples):
    model = two("english")
    voices, own = model.turbo.voices, own_of(model)
    with pytest.raises(FileNotFoundError):
        voices.add("x", "none.wav")
    with pytest.raises(ReferenceAudioError):
        voices.add("x", io.BytesIO(b"not audio"))
    with pytest.raises(ReferenceAudioError, match=r"an array|a NumPy array"):
        voices.add("x", samples)

    def broken(name, value, half="gen"):
        given = voices.conditionals("low")
        values = given.gen if half == "gen" else vars(given.t3)
        values[name] = value
        return given

    embedding = torch.full((1, 192), float("nan"))
    for given, said in (
        (broken("embedding", embedding), "embedding has values that are not finite"),
        (broken("embedding", torch.ones(1, 80)), "embedding has 80 values, and this model needs 192"),
        (broken("embedding", None), "embedding is None"),
        (broken("prompt_token", torch.ones(2, 3)), r"prompt_token is torch.float32 of shape \(2, 3\)"),
        (broken("prompt_token", torch.full((1, 3), -1)), "below 0"),
        (broken("prompt_token", torch.full((1, 3), 6561)), "id 6561"),
        (broken("prompt_token", torch.tensor([[0.5]])), "fractions"),
        (broken("prompt_token", torch.tensor([[4001.0]], dtype=torch.bfloat16)), "rounded"),
        (broken("prompt_feat", torch.ones(1).expand(1, 2**20, 80)), "prompt_feat is"),
        (broken("loudness", torch.ones(1)), "'loudness', which this package does not know"),
        (broken("speaker_emb", torch.ones(1, 128), "t3"), "speaker_emb has 128"),
        (
            broken("cond_prompt_speech_tokens", torch.ones(1, 375).long(), "t3"),
            "375 speech tokens, and this model's 25",
        ),
        (broken("cond_prompt_speech_tokens", None, "t3"), "prompt for T3 is missing"),
        (broken("clap_emb", torch.ones(1), "t3"), "clap_emb"),
        (voices.conditionals("low").gen, "no half for T3"),
    ):
        with pytest.raises(InvalidRequestError, match=f"'x' does not fit this model.*{said}"):
            voices.add("x", given)
    assert own_of(model) is own and voices.list() == ["low", "high"]


def test_what_upstream_has_written_into_a_voice_is_put_right(two):
    model = two("english")
    voices = model.turbo.voices
    turbo.revert(model)
    model.conds = voices.conditionals("low")
    speak(model)
    assert model.conds.gen["prompt_token"].is_floating_point() and model.conds.t3.cond_prompt_speech_emb is not None
    turbo.apply(model, EXACT)
    model.turbo.voices.add("again", model.conds)
    assert model.turbo.voices._find("again").digest == voices._find("low").digest


def test_voices_outlive_configurations_and_renewals_but_not_reverting(two, tmp_path):
    model = two("english")
    voices = model.turbo.voices
    low = speak(model, 1, voice="low")
    turbo.apply(model, WITHOUT)
    assert model.turbo.voices is voices and voices.recordings is None and "2 named" in str(model.turbo.report())
    assert torch.equal(speak(model, 1, voice="low"), low)
    with pytest.raises(turbo.errors.UnavailablePassError):
        turbo.apply(model, {"alignment": {"enabled": True}})
    turbo.apply(model, {**EXACT, "conditioning": {"voices_bytes": 0, "matmul": "torch"}})
    assert voices.list() == ["low", "high"], "a smaller bound takes nothing away"
    with turbo.optimized(model, EXACT):
        assert model.turbo.voices is voices
    turbo.apply(model, EXACT)
    model.ve.load_state_dict(model.ve.state_dict())  # other weights, as far as anybody can tell
    assert torch.equal(speak(model, 1, voice="low"), low) and voices.list() == ["low", "high"]
    turbo.revert(model)
    with pytest.raises(TypeError, match="voice"):
        model.generate("Hello.", voice="low")
    for gone in (lambda: voices.use("low"), lambda: voices.using("low").__enter__(), lambda: voices.add("x", "x.wav")):
        with pytest.raises(
            (InvalidRequestError, FileNotFoundError), match=r"not optimized any more|no reference audio"
        ):
            gone()
    assert voices.save(tmp_path) == ["low", "high"]
    turbo.apply(model, EXACT)
    assert model.turbo.voices is not voices and model.turbo.voices.list() == []
    assert model.turbo.voices.load(tmp_path) == ["high", "low"]
    assert torch.equal(speak(model, 1, voice="low"), low)


def test_room_is_bounded_and_nothing_is_dropped(two, tmp_path):
    model = two("english")
    voices = model.turbo.voices
    voices.save(tmp_path)
    size = voices.show("low")["bytes"]
    room = 2 * size + 100  # high is shorter by a frame or so
    turbo.apply(model, {**EXACT, "conditioning": {"voices_bytes": room, "matmul": "torch"}})
    given = voices.conditionals("low")
    with pytest.raises(InvalidRequestError, match=r"no room for 'x'.*are taken by 2 voices.*conditioning.voices_bytes"):
        voices.add("x", given)
    voices.add("high", given, replace=True)
    voices.remove("high")
    voices.remove("low")
    voices.add("x", given)
    with pytest.raises(InvalidRequestError, match="no room for 'high', 'low'"):
        voices.load(tmp_path)
    assert voices.list() == ["x"]
    assert voices.load(tmp_path, ["high"]) == ["high"]


@pytest.mark.parametrize("family", FAMILIES)
def test_blends_lie_between(two, family):
    model = two(family)
    voices = model.turbo.voices
    voices.blend({"low": 3, "high": 1.0}, as_="mix")
    mix, low, high = (stored(voices, name) for name in ("mix", "low", "high"))
    for name in {"gen.embedding", "t3.speaker_emb"} & low.keys():
        similar = torch.cosine_similarity
        assert similar(low[name], high[name]) < similar(high[name], mix[name]) < similar(low[name], mix[name]) < 1
        if name == "t3.speaker_emb":
            assert mix[name].norm() == pytest.approx(1.0, abs=1e-6)
    assert all(torch.equal(mix[name], low[name]) for name in low.keys() - {"gen.embedding", "t3.speaker_emb"})
    assert voices.show("mix")["source"] == {"kind": "blend", "of": {"low": 0.75, "high": 0.25}}
    spoken = [speak(model, 1, voice=name) for name in ("mix", "low", "high")]
    assert not torch.equal(spoken[0], spoken[1]) and not torch.equal(spoken[0], spoken[2])
    voices.blend({"low": 7}, as_="same")
    assert all(torch.allclose(value, low[name]) for name, value in stored(voices, "same").items())
    for weights in ({}, None, {"low": 0}, {"low": -1}, {"low": float("nan")}, {"low": True}, {"low": "1"}):
        with pytest.raises(InvalidRequestError, match="weight"):
            voices.blend(weights, as_="x")
    opposite = voices.conditionals("low")
    (opposite if family == "vc" else opposite.gen)["embedding"].neg_()
    voices.add("opposite", opposite)
    with pytest.raises(InvalidRequestError, match="cancel each other"):
        voices.blend({"low": 1, "opposite": 1}, as_="x")
    assert "x" not in voices


def test_memory_counts_named_voices(two, tmp_path):
    model = two("english")
    model.turbo.voices.clear()
    assert model.turbo.memory()["held"]["voices"]["bytes"] == model.turbo.voices.named_nbytes > 0


def test_voices_of_arrays(two):
    """What upstream calls its production API hands in arrays."""
    model = two("vc")
    voices = model.turbo.voices
    arrays = {n: None if t is None else t.numpy() for n, t in voices.conditionals("low").items()}
    voices.add("arrays", arrays)
    assert voices._find("arrays").digest == voices._find("low").digest
    assert isinstance(arrays["embedding"], np.ndarray)


def test_a_recording_as_every_kind_of_file(two, tmp_path, samples):
    voices = two("english").turbo.voices
    path = tmp_path / "a.wav"
    path.write_bytes(wav(samples[: 6 * RATE]).getvalue())
    file = wav(samples[: 6 * RATE])
    for number, given in enumerate((path, str(path), file, soundfile.SoundFile(path))):
        voices.add(f"v{number}", given)
        assert voices._find(f"v{number}").digest == voices._find("low").digest
    with path.open("rb") as opened:
        voices.add("opened", opened)
    assert voices.show("opened")["source"] == voices.show("v0")["source"]


def test_a_model_without_a_voice(fresh, samples):
    model = turbo.apply(fresh("english"), EXACT)
    model.conds = None
    model.turbo.voices.add("low", wav(samples[: 6 * RATE]))
    assert model.conds is None
    spoken = speak(model, voice="low")
    assert torch.isfinite(spoken).all() and model.conds is None
    model.s3gen.speaker_encoder = copy.deepcopy(model.s3gen.speaker_encoder)
    assert torch.equal(speak(model, voice="low"), spoken) and model.turbo.renewals
    encode(model, wav(samples[: 6 * RATE]))
    assert NamedVoice(cleaned(*halves(model.conds)), "english").digest == model.turbo.voices._find("low").digest
    turbo.revert(model)
