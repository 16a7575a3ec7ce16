"""Configurations: files, environment, presets, and one clear message for each kind of mistake."""

from __future__ import annotations

import json
import traceback

import pytest
from pydantic import ValidationError

from chatterbox_turbo import OptimizationConfig
from chatterbox_turbo.config import presets, resolve
from chatterbox_turbo.config.files import environment
from chatterbox_turbo.errors import InvalidConfigError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".yml", ".json"])
def test_files_come_back_equal(tmp_path, suffix):
    config = OptimizationConfig(preset="exact", decoding={"max_new_tokens": 500}, warmup={"level": "light"})
    assert OptimizationConfig.from_file(config.to_file(tmp_path / f"turbo{suffix}")) == config


def test_a_preset_in_a_file_gives_the_keys_that_the_file_does_not_set(tmp_path):
    path = write(tmp_path / "turbo.toml", 'preset = "exact"\n[decoding]\nmax_new_tokens = 500\n')
    config = resolve(path)
    assert (config.fidelity, config.decoding.max_new_tokens, config.decoding.enabled) == ("exact", 500, "auto")
    assert resolve(str(path)) == config
    above = write(tmp_path / "above.toml", 'preset = "exact"\nfidelity = "lossy"\n')
    assert resolve(above).fidelity == "lossy"


def test_environment_overrides_files_and_presets(tmp_path, monkeypatch):
    path = write(tmp_path / "turbo.toml", "[decoding]\nmax_new_tokens = 500\nprogress = 'off'\n")
    monkeypatch.setenv("CHATTERBOX_TURBO__DECODING__MAX_NEW_TOKENS", "77")
    monkeypatch.setenv("CHATTERBOX_TURBO__ALIGNMENT__ENABLED", "false")
    for config in (resolve(path), resolve(None), resolve("exact")):
        assert config.decoding.max_new_tokens == 77 and config.alignment.enabled is False
    assert resolve(path).decoding.progress == "off"
    assert resolve({"decoding": {"max_new_tokens": 5}}).decoding.max_new_tokens == 5
    monkeypatch.setenv("CHATTERBOX_TURBO__DECODING__MAX_NEW_TOKENS", "none")
    assert resolve(path).decoding.max_new_tokens is None


def test_environment_contradictions_are_told():
    with pytest.raises(InvalidConfigError, match="contradicts"):
        environment({"CHATTERBOX_TURBO__DECODING": "1", "CHATTERBOX_TURBO__DECODING__ENABLED": "true"})


def test_no_configuration_is_the_default_preset_without_loss():
    assert resolve(None).preset == presets.DEFAULT
    assert resolve(None).fidelity == "numerical"


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_valid_and_described(name):
    config = resolve(name)
    assert config == OptimizationConfig.from_preset(name)
    assert presets.DESCRIPTIONS[name]


def test_frozen_and_with_a_schema():
    config = OptimizationConfig()
    with pytest.raises(ValidationError):
        config.fidelity = "lossy"
    schema = json.dumps(OptimizationConfig.model_json_schema())
    assert '"max_new_tokens"' in schema and '"additionalProperties": false' in schema


@pytest.mark.parametrize(
    "text, said",
    [
        ("[decodin]\n", "decodin: unknown key (did you mean 'decoding'?)"),
        ("[decoding]\nmax_new_token = 3\n", "decoding.max_new_token: unknown key (did you mean 'max_new_tokens'?)"),
        ("[decoding]\nmax_new_tokens = 'x'\n", "decoding.max_new_tokens: input should be a valid integer"),
        ("[decoding]\nmax_new_tokens = 0\n", "decoding.max_new_tokens: input should be greater than or equal to 1"),
        ("[decoding]\nenabled = 'maybe'\n", "decoding.enabled: input should be a valid boolean"),
        ("decoding = 3\n", "decoding: input should be a valid dictionary"),
        ("fidelity = 'good'\n", "fidelity: input should be 'exact', 'numerical' or 'lossy' (got 'good')"),
        ("preset = 'exakt'\n", "unknown preset 'exakt' (did you mean 'exact'?)"),
        ("[precision]\ntf32 = true\n", "precision is lossy, above the ceiling"),
        ("preset = 'exact'\n[precision]\ntf32 = true\n", 'above the ceiling fidelity = "exact"'),
        ("fidelity = 'exact'\n[vocoder]\ncompile = true\n", "vocoder is numerical, above the ceiling"),
        ("[warmup]\nenabled = true\n", "warmup.enabled is true but warmup.level is off"),
        ("[warmup]\nenabled = false\nlevel = 'full'\n", "warmup.enabled is false but warmup.level asks for it"),
    ],
)
def test_each_mistake_in_a_file_names_file_and_key(tmp_path, text, said):
    path = write(tmp_path / "turbo.toml", text)
    with pytest.raises(InvalidConfigError) as caught:
        resolve(path)
    assert str(path) in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_mistakes_are_told_at_once():
    with pytest.raises(InvalidConfigError) as caught:
        OptimizationConfig(decodin={}, warmup={"level": "hot"})
    assert len(str(caught.value).splitlines()) == 2


def test_a_mistake_in_the_environment_names_the_variable(tmp_path, monkeypatch):
    path = write(tmp_path / "turbo.toml", "[decoding]\nprogress = 'off'\n")
    monkeypatch.setenv("CHATTERBOX_TURBO__DECODING__MAX_NEW_TOKEN", "7")
    with pytest.raises(InvalidConfigError, match=r"^CHATTERBOX_TURBO__DECODING__MAX_NEW_TOKEN: decoding\.max"):
        resolve(path)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("missing.toml", None, "No such file"),
        ("bad.toml", "[decoding\n", "not valid TOML"),
        ("bad.json", "{", "not valid JSON"),
        ("bad.yaml", "a: [", "not valid YAML"),
        ("list.yaml", "- 1\n- 2\n", "holds a list"),
        ("turbo.ini", "", "unknown suffix '.ini'"),
    ],
)
def test_unreadable_files(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(InvalidConfigError) as caught:
        resolve(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_what_is_neither_preset_nor_path_is_refused():
    with pytest.raises(InvalidConfigError, match="did you mean 'exact'"):
        resolve("exat")
    with pytest.raises(InvalidConfigError, match="cannot be a int"):
        resolve(3)


def test_no_message_repeats_a_long_value(tmp_path):
    long = "UklGR" * 100_000
    mistakes = (
        lambda: resolve(long),
        lambda: resolve(long + "/file.toml"),
        lambda: resolve("/" + long),
        lambda: resolve({"preset": long}),
        lambda: resolve({"decoding": {"max_new_tokens": long}}),
        lambda: resolve({"decoding": {"max_new_tokens": list(range(100_000))}}),
        lambda: resolve({"fidelity": long.encode()}),
    )
    for mistake in mistakes:
        with pytest.raises(InvalidConfigError) as caught:
            mistake()
        assert len("".join(traceback.format_exception(caught.value))) < 8000


def test_a_function_for_progress_cannot_be_written(tmp_path):
    config = OptimizationConfig(decoding={"progress": print})
    with pytest.raises(InvalidConfigError, match=r"decoding\.progress is a function"):
        config.to_file(tmp_path / "turbo.toml")
    assert not (tmp_path / "turbo.toml").exists()


@pytest.mark.parametrize(
    "values, lengths",
    [
        ({}, (12, 18)),
        ({"longest": 5}, (5, 5)),
        ({"target": 30}, (30, 30)),
        ({"target": 5}, (5, 18)),
        ({"target": 5, "longest": 6}, (5, 6)),
    ],
)
def test_no_piece_is_meant_to_be_longer_than_the_longest(values, lengths):
    assert resolve({"text": values}).text.lengths == lengths


@pytest.mark.parametrize(
    "values, said",
    [
        ({"target": 30, "longest": 5}, "text: target is 30 and longest is 5"),
        ({"longest": float("nan")}, "text.longest"),
        ({"pauses": {"word": -1}}, "text.pauses"),
        ({"pauses": {"word": 60.5}}, "text.pauses"),
        ({"pauses": {"word": float("nan")}}, "text.pauses"),
        ({"pauses": {"word": float("inf")}}, "text.pauses"),
    ],
)
def test_lengths_and_pauses_that_no_text_can_have_are_refused_at_once(values, said):
    with pytest.raises(InvalidConfigError) as caught:
        resolve({"text": values})
    assert said in str(caught.value)
