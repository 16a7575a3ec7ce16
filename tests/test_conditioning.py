"""Reference voices: encoded once, without a graph and without numba, on the way that the ceiling allows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cases import FAMILIES, SPEAKING, count_hooks, speak
from recordings import EXACT, RATE, differences, encode, encodings, voice_of, wav

import chatterbox_turbo as turbo
from chatterbox_turbo.errors import SpeechTruncatedWarning
from chatterbox_turbo.runtime.voice.cache import Voice, VoiceCache
from chatterbox_turbo.upstream import warmup as upstream_warmup


@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_hangs_on_a_voice(kept, samples, family):
    model, saved = kept(family), []

    def counted(call):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1) or t, lambda t: t):
            call()
        return len(saved)

    def embed():
        return model.s3gen.embed_ref(samples[:RATE], RATE, device="cpu")

    assert counted(embed) > 0 and embed()["embedding"].requires_grad
    turbo.apply(model, EXACT)
    assert counted(lambda: encode(model, wav(samples))) == 0
    assert counted(embed) == 0 and not embed()["embedding"].requires_grad
    with torch.inference_mode():
        encode(model, wav(samples))
    assert not [name for name, v in voice_of(model).items() if torch.is_tensor(v) and v.is_inference()]


@pytest.mark.exhaustive
def test_what_numba_compiles_is_not_imported(voice):
    """In a process that has encoded nothing: librosa's utilities and effects."""
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
import chatterbox_turbo as turbo
from chatterbox_turbo.synthetic import build, checkpoint
checkpoint._encode_reference_voice = lambda model, size: None
heavy = ("librosa.util.utils", "librosa.effects", "librosa.core.spectrum", "sklearn.decomposition")
model = build("english")
before = [name for name in heavy if name in sys.modules]
turbo.apply(model, {EXACT!r})
model.prepare_conditionals({voice!r})
print("RESULT", before, [name for name in heavy if name in sys.modules])
turbo.revert(model)
model.prepare_conditionals({voice!r})
print("RESULT", [name for name in heavy if name in sys.modules])
"""
    root = str(Path(turbo.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines[0] == "RESULT [] []", done.stderr
    assert "librosa.util.utils" in lines[1], "upstream imports them, else this test could not fail"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_is_encoded_once_whatever_its_path(kept, samples, tmp_path, family):
    model = kept(family)
    turbo.apply(model, EXACT)
    data = wav(samples).getvalue()
    runs, hook = encodings(model)
    first, second = tmp_path / "a.wav", tmp_path / "b.wav"
    for path in (first, second):
        path.write_bytes(data)
    try:
        encode(model, str(first))
        expected = voice_of(model)
        for file in (first, second, str(second), os.fsencode(second), io.BytesIO(data), second.open("rb")):
            encode(model, file)
            assert differences(voice_of(model), expected) == []
        speak(model, **{"target_voice_path" if family == "vc" else "audio_prompt_path": str(second)})
        assert len(runs) == 1
        twice = io.BytesIO(data)
        encode(model, twice)
        encode(model, twice)  # read to its end by now
        encode(model, soundfile.SoundFile(first))  # known by its samples only
        assert differences(voice_of(model), expected) == []
        assert len(runs) == 2
        first.write_bytes(wav(samples[: 6 * RATE]).getvalue())
        encode(model, str(first))
        assert len(runs) == 3 and len(model.turbo.voices) == 3
    finally:
        hook.remove()
    assert model.turbo.voices.hits == 9 and model.turbo.voices.misses == 3
    assert "3 kept" in str(model.turbo.report()) and "9 found" in model.turbo.report().to_dict()["voices"]
    model.turbo.voices.clear()
    assert len(model.turbo.voices) == model.turbo.voices.nbytes == 0


def test_what_a_voice_depends_on(kept, samples):
    model = kept("english")
    turbo.apply(model, EXACT)
    runs, hook = encodings(model)
    try:
        encode(model, wav(samples), exaggeration=0.25)
        assert model.conds.t3.emotion_adv.item() == 0.25
        encode(model, wav(samples), exaggeration=0.75)
        assert model.conds.t3.emotion_adv.item() == 0.75 and len(runs) == 1
        encode(model, wav(samples))
        assert model.conds.t3.emotion_adv.item() == 0.5 and len(runs) == 1
        model.ve.load_state_dict(model.ve.state_dict())  # other weights, as far as anybody can tell
        encode(model, wav(samples))
        assert len(runs) == 2
        model.DEC_COND_LEN = 2 * RATE
        encode(model, wav(samples))
        assert len(runs) == 3 and model.conds.gen["prompt_feat"].shape[1] == 100
    finally:
        hook.remove()
        vars(model).pop("DEC_COND_LEN", None)
    turbo_model = kept("turbo")
    turbo.apply(turbo_model, EXACT)
    encode(turbo_model, wav(samples), norm_loudness=True)
    loud = voice_of(turbo_model)
    encode(turbo_model, wav(samples * 0.1), norm_loudness=False)
    encode(turbo_model, wav(samples), norm_loudness=False)
    assert differences(voice_of(turbo_model), loud)
    assert turbo_model.turbo.voices.misses == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_generate_writes_into_a_voice_stays_out_of_the_cache(kept, samples, family):
    model = kept(family)
    turbo.apply(model, EXACT)
    encode(model, wav(samples))
    expected = voice_of(model)
    speak(model)
    assert differences(voice_of(model), expected), "upstream casts ids to floats, else this test could not fail"
    with torch.no_grad():
        (model.ref_dict if family == "vc" else model.conds.gen)["embedding"].zero_()
    encode(model, wav(samples))
    assert differences(voice_of(model), expected) == []


def test_a_voice_set_by_hand_is_used(kept, samples):
    model = kept("english")
    turbo.apply(model, EXACT)
    encode(model, wav(samples))
    own, expected = model.conds, speak(model)
    encode(model, wav(samples[: 3 * RATE]))
    assert not torch.equal(speak(model), expected)
    model.conds = own
    assert torch.equal(speak(model, audio_prompt_path=None), expected)
    assert model.turbo.voices.misses == 2


def test_the_cache_is_bounded_by_bytes(kept, samples):
    model = kept("english")
    turbo.apply(model, {**EXACT, "conditioning": {"matmul": "torch", "cache_bytes": 0}})
    encode(model, wav(samples))
    encode(model, wav(samples))
    assert (len(model.turbo.voices), model.turbo.voices.hits) == (0, 0)

    def voice(number, size=25):
        return Voice({"speaker_emb": torch.full((size,), float(number)), "none": None}, {"length": None})

    cache = VoiceCache(300)  # three voices of 100 bytes
    for number in range(3):
        cache.put(number, voice(number))
    assert cache.get(0).t3["speaker_emb"][0] == 0
    cache.put(3, voice(3))
    assert [number for number in range(4) if cache.get(number)] == [0, 2, 3]
    cache.put(0, voice(7))
    assert cache.get(0).t3["speaker_emb"][0] == 7 and cache.nbytes == 300
    cache.put(9, voice(9, size=76))
    assert cache.get(9) is None and len(cache) == 3
    cache.put(4, voice(4, size=75))
    assert (len(cache), cache.nbytes) == (1, 300)


def test_threads_share_the_cache(kept, samples):
    cache, wrong = VoiceCache(1000), []

    def work(start):
        for number in range(start, start + 200):
            cache.put(number % 20, Voice({"x": torch.full((25,), float(number % 20))}, {}))
            found = cache.get(number % 7)
            if found is not None and found.t3["x"][0] != number % 7:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.nbytes == 100 * len(cache) <= 1000
    model = kept("english")
    turbo.apply(model, EXACT)
    runs, hook = encodings(model)
    threads = [threading.Thread(target=encode, args=(model, wav(samples))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert len(runs) == 1 and model.turbo.voices.hits == 3


def test_arguments_are_upstreams(kept, samples):
    model = kept("english")
    turbo.apply(model, EXACT)
    model.prepare_conditionals(wav_fpath=wav(samples), exaggeration=0.3)
    model.prepare_conditionals(wav(samples), 0.4)
    for wrong in ({}, {"wav_fpath": wav(samples), "loudness": 3}):
        with pytest.raises(TypeError):
            model.prepare_conditionals(**wrong)
    turbo.revert(model)
    assert "prepare_conditionals" not in vars(model) and count_hooks(model.s3gen) == 0


def test_turbo_takes_a_reference_where_its_loudness_comes_in_float64(kept, monkeypatch, samples):
    """As with NumPy 2, whatever NumPy is installed."""
    model = kept("turbo")
    loud = model.norm_loudness
    monkeypatch.setattr(model, "norm_loudness", lambda x, rate: loud(x, rate).astype(np.float64), raising=False)
    with pytest.raises(RuntimeError):
        encode(model, wav(samples))
    turbo.apply(model, EXACT)
    encode(model, wav(samples))
    assert voice_of(model)["speaker_emb"].dtype == torch.float32


def test_unknown_encoders_are_left_to_upstream(kept, monkeypatch):
    import librosa

    model = kept("english")

    def reason():
        return turbo.inspect(model, EXACT | {"conditioning": {}}).step("conditioning").reason

    assert reason() == ""
    with monkeypatch.context() as patch:
        patch.setattr(type(model.ve.hp), "preemphasis", 0.97)
        assert "preemphasis" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(librosa, "resample", lambda y, *, orig_sr, target_sr, res_type="kaiser_best": y)
        assert "kaiser_best" in reason()
    names = type(model.ve).embeds_from_wavs.__globals__
    for name in ("get_num_wins", "melspectrogram"):
        with monkeypatch.context() as patch:
            patch.setitem(names, name, lambda *args: None)
            assert name in reason()
    with monkeypatch.context() as patch:
        patch.setitem(names["melspectrogram"].__globals__, "_stft", lambda *args: None)
        assert "_stft" in reason()
    with monkeypatch.context() as patch:
        patch.delitem(type(model).prepare_conditionals.__globals__, "S3_SR")
        assert "S3_SR" in reason()
    original = model.s3gen.mel_extractor
    monkeypatch.setattr(model.s3gen, "mel_extractor", lambda y: original(y))
    turbo.apply(model, EXACT)
    assert "its code is unknown" in model.turbo.plan.step("conditioning").reason
    turbo.revert(model)


@pytest.mark.parametrize("family", SPEAKING)
def test_a_warm_up_leaves_no_voice_behind(kept, family):
    model = kept(family)
    turbo.apply(model, {**EXACT, "warmup": {"level": "full"}})
    assert len(model.turbo.voices) == 0 and model.turbo.voices.misses == 1


def test_a_warm_up_leaves_pythons_filters_of_warnings_alone(english, monkeypatch):
    """They are the process's: two models that were warmed up at once could leave them without a warning for good."""

    def speak(*arguments, **options):
        seen.append(list(warnings.filters))
        return real(*arguments, **options)

    def cut():
        return [one for one in caught if one.category is SpeechTruncatedWarning]

    real, seen = upstream_warmup.speak, []
    monkeypatch.setattr(upstream_warmup, "speak", speak)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        turbo.apply(english, {"warmup": {"level": "light"}, "decoding": {"progress": "off"}})
        assert seen == [before] and not cut()
        turbo.apply(english, {"decoding": {"progress": "off", "max_new_tokens": 3}})
        english.generate("Hello.")
    assert len(cut()) == 1


def test_without_the_pass_no_recordings_are_kept(english):
    turbo.apply(english, {"conditioning": {"enabled": False}, "decoding": {"enabled": False}})
    voices = english.turbo.voices
    assert voices.recordings is None and "voices" not in str(english.turbo.report())
    voices.clear()
    assert len(voices) == voices.nbytes == voices.hits == voices.misses == 0
