"""Synthetic models: what `build` makes, upstream's own `from_local` loads, and it stops where it was told."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from cases import has, recording

from chatterbox_turbo import synthetic

STOP = 16
TEXTS = ("Hi.", "The tide went out before noon, and the boats lay still.", "One more line. " * 12)
OPTIONS = {"nano": {"nano": True}}


INSTALLED = [
    pytest.param(f, marks=pytest.mark.skipif(not has(f), reason=f"the installed chatterbox-tts has no {f} model"))
    for f in synthetic.FAMILIES
]
SPEAKING = [case for case in INSTALLED if case.values[0] != "vc"]


@pytest.fixture(scope="module")
def models():
    """One tiny model per family, built at its first use."""
    built: dict = {}

    def get(family: str):
        if family not in built:
            built[family] = synthetic.build(family, stop_after=None if family == "vc" else STOP)
        return built[family]

    return get


def speak(model, family: str, text: str = TEXTS[0], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    if family == "vc":
        return model.generate(recording(2.0))
    return model.generate(text, "en") if family == "multilingual" else model.generate(text)


def speech_tokens(model, family: str, text: str, seed: int) -> list[int]:
    """The speech tokens that `generate` hands to S3Gen, without the three of silence that Turbo appends."""
    seen = []
    model.s3gen.inference = lambda speech_tokens, **_: (seen.append(speech_tokens), (torch.zeros(1, 24000), None))[1]
    try:
        speak(model, family, text, seed)
    finally:
        del model.s3gen.inference
    tokens = seen[0].flatten().tolist()
    return tokens[:-3] if family in ("turbo", "nano") else tokens


def weights(model) -> dict[str, torch.Tensor]:
    parts = [(name, getattr(model, name)) for name in ("t3", "s3gen", "ve") if hasattr(model, name)]
    # `patched_model` is what upstream's `inference` leaves behind in T3.
    return {f"{n}.{k}": v for n, p in parts for k, v in p.state_dict().items() if "patched_model" not in k}


def voice(model) -> dict[str, torch.Tensor]:
    # Upstream's S3Gen turns the token ids of the dictionary it is given into floats.
    entries = model.ref_dict if hasattr(model, "ref_dict") else {**vars(model.conds.t3), **model.conds.gen}
    return {k: v.float() for k, v in entries.items() if torch.is_tensor(v) and k != "cond_prompt_speech_emb"}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


@pytest.mark.parametrize("family", INSTALLED)
def test_upstream_loads_what_save_writes(models, tmp_path, family):
    built = models(family)
    folder = synthetic.save(tmp_path / "new" / family, family, stop_after=None if family == "vc" else STOP)
    with synthetic.architecture("tiny"):
        loaded = type(built).from_local(folder, "cpu", **OPTIONS.get(family, {}))
    assert_equal(weights(loaded), weights(built))
    assert_equal(voice(loaded), voice(built))
    modules = [part for part in vars(loaded).values() if isinstance(part, torch.nn.Module)]
    assert modules and not any(part.training for part in modules)
    assert torch.equal(speak(loaded, family), speak(built, family))


def test_same_arguments_same_model(models):
    again, other = synthetic.build("english", stop_after=STOP), synthetic.build("english", stop_after=STOP, seed=1)
    assert_equal(weights(again), weights(models("english")))
    assert_equal(voice(again), voice(models("english")))
    assert not torch.equal(other.t3.speech_head.weight, again.t3.speech_head.weight)


def test_callers_random_state_is_untouched():
    torch.manual_seed(5)
    np.random.seed(5)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    synthetic.build("english", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)


@pytest.mark.parametrize("family", SPEAKING)
def test_speech_ends_at_stop_after(models, family):
    model = models(family)
    for seed, text in enumerate(TEXTS):
        tokens = speech_tokens(model, family, text, seed)
        # The alignment analyzer suppresses a stop before the end of the text, and forces one at a repetition.
        assert STOP <= len(tokens) <= STOP + (2 if family == "multilingual" else 0)
        assert max(tokens) < 6561
        assert len(set(tokens)) > STOP / 2


@pytest.mark.parametrize("family", ["english", pytest.param("turbo", marks=INSTALLED[2].marks)])
def test_stop_moves_with_the_argument(family):
    model = synthetic.build(family, stop_after=60)  # longer than the prompt and the text of a short sentence
    assert len(speech_tokens(model, family, "Hi.", 0)) == 60


@pytest.mark.parametrize("family", SPEAKING)
def test_text_and_seed_change_the_tokens(models, family):
    model = models(family)
    first = speech_tokens(model, family, TEXTS[0], 0)
    assert first == speech_tokens(model, family, TEXTS[0], 0)
    assert first != speech_tokens(model, family, TEXTS[1], 0)
    assert first != speech_tokens(model, family, TEXTS[0], 1)


@pytest.mark.parametrize("family", INSTALLED)
def test_audio_is_loud_and_watermarked(models, family):
    model = models(family)
    audio = speak(model, family, TEXTS[1]).squeeze(0).numpy()
    assert np.isfinite(audio).all()
    assert 0.01 < audio.std() < 0.5
    assert (abs(audio) > 0.98).mean() < 0.01
    assert model.watermarker.get_watermark(audio, sample_rate=model.sr) == 1.0
    noise = np.random.default_rng(0).normal(0, audio.std(), audio.shape).astype(np.float32)
    assert model.watermarker.get_watermark(noise, sample_rate=model.sr) == 0.0


def everything_patched() -> list:
    t3 = importlib.import_module("chatterbox.models.t3.t3")
    s3gen = importlib.import_module("chatterbox.models.s3gen.s3gen")
    speech_tokenizer = importlib.import_module("s3tokenizer.model_v2").S3TokenizerV2
    text = importlib.import_module("chatterbox.models.tokenizers.tokenizer")
    encoder = importlib.import_module("chatterbox.models.voice_encoder").VoiceEncoder
    owners = [t3.T3, s3gen, s3gen.S3Token2Wav, speech_tokenizer, encoder]
    owners += [text.ChineseCangjieConverter] if hasattr(text, "ChineseCangjieConverter") else []
    return [dict(vars(owner)) for owner in owners] + [{k: dict(v) for k, v in t3.LLAMA_CONFIGS.items()}]


@pytest.mark.parametrize("size", synthetic.SIZES)
def test_architecture_restores_upstream(size):
    before = everything_patched()
    with pytest.raises(RuntimeError, match="inside"), synthetic.architecture(size):
        assert everything_patched() != before
        raise RuntimeError("inside")
    assert everything_patched() == before


def test_failing_constructor_restores_the_configuration():
    before = everything_patched()
    t3 = importlib.import_module("chatterbox.models.t3.t3")
    with synthetic.architecture("tiny"), pytest.raises(AttributeError):
        hp = importlib.import_module("chatterbox.models.t3.modules.t3_config").T3Config()
        del hp.encoder_type
        t3.T3(hp)
    synthetic.build("vc")
    assert everything_patched() == before


def test_full_keeps_the_sizes():
    config = importlib.import_module("chatterbox.models.t3.llama_configs").LLAMA_CONFIGS["Llama_520M"]
    with synthetic.architecture("full"), torch.device("meta"):
        t3 = importlib.import_module("chatterbox.models.t3").T3()
    assert len(t3.tfmr.layers) == config["num_hidden_layers"] == 30
    assert t3.hp.speech_cond_prompt_len == 150


@pytest.mark.parametrize("family", [pytest.param("multilingual", marks=INSTALLED[1].marks)])
def test_every_language_tokenizes_without_a_network(models, family):
    model = models(family)
    for text, language in [("Guten Tag, schöne Welt", "de"), ("Привет", "ru"), ("नमस्ते", "hi"), ("你好", "zh")]:
        ids = model.tokenizer.text_to_tokens(text, language_id=language)
        assert 0 < int(ids.max()) < model.t3.hp.text_tokens_dict_size
        assert ids[0, 0] == model.tokenizer.tokenizer.token_to_id(f"[{language}]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("klingon",), "Unknown family 'klingon'.*english, multilingual.*Pass one"),
        (("english", "huge"), "Unknown size 'huge'.*tiny, full"),
        (("english", "tiny", 1), "stop_after is 1.*from 2 to 990"),
        (("english", "tiny", 24.0), "stop_after is 24.0.*integer"),
        (("english", "tiny", 1000), "stop_after is 1000"),
        (("vc", "tiny", 24), "no stop.*Leave stop_after as None"),
    ],
)
def test_invalid_arguments_are_explained(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic.build(*arguments)
    with pytest.raises(ValueError, match=message):
        synthetic.save(tmp_path / "none", *arguments)
    assert not (tmp_path / "none").exists()


def test_unknown_architecture_is_explained():
    with pytest.raises(ValueError, match=r"Unknown size 'small'.*tiny, full"), synthetic.architecture("small"):
        pass


def test_missing_families_are_explained(monkeypatch):
    configs = importlib.import_module("chatterbox.models.t3.llama_configs").LLAMA_CONFIGS
    monkeypatch.delitem(configs, "GPT2_small", raising=False)
    if has("turbo"):
        with pytest.raises(ValueError, match=r"lacks the Nano model.*choose 'turbo'"):
            synthetic.build("nano")
    monkeypatch.setitem(sys.modules, "chatterbox.tts_turbo", None)  # what an older release looks like to an import
    with pytest.raises(ValueError, match=r"no chatterbox.tts_turbo.*another family"):
        synthetic.build("turbo")


def test_reference_voice_is_24_khz_mono():
    info = soundfile.info(synthetic.reference_voice())
    assert (info.samplerate, info.channels, info.format) == (24000, 1, "FLAC")
    assert 10 <= info.duration <= 12


def test_import_is_light():
    code = "import sys, chatterbox_turbo.synthetic; print([m for m in ('torch', 'chatterbox') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
