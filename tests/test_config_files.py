"""Configuration files: there and back with what was set and what was not, and one clear error for each that is none."""

from __future__ import annotations

import codecs

import pytest

from chatterbox_turbo import OptimizationConfig
from chatterbox_turbo.budget.ladder import rungs
from chatterbox_turbo.cli import main
from chatterbox_turbo.config import resolve
from chatterbox_turbo.errors import InvalidConfigError

SUFFIXES = (".toml", ".yaml", ".json")
DEEP = 100_000


def through(config, path):
    return OptimizationConfig.from_file(config.to_file(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "values",
    [
        {"preset": "max_speed", "flow": {"steps": None}},
        {"preset": "vram_2gb", "decoding": {"max_new_tokens": None}, "text": {"pauses": {"word": 0.5}}},
        {"memory_budget": "2GB", "budget_slots": 3},
        {"vocoder": {"kind": "vocos", "checkpoint": "a/b"}, "fidelity": "lossy"},
        {},
    ],
)
def test_what_is_set_comes_back_and_nothing_else(tmp_path, suffix, values):
    config = OptimizationConfig(**values)
    back = through(config, tmp_path / f"turbo{suffix}")
    assert back == config
    assert back.model_dump(exclude_unset=True) == config.model_dump(exclude_unset=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_budget_has_as_much_to_choose_from_after_a_file(tmp_path, suffix):
    config = OptimizationConfig(memory_budget="2GB", fidelity="lossy")
    usable = [
        [rung.name for rung in rungs(one, True) if rung.config]
        for one in (config, through(config, tmp_path / f"a{suffix}"))
    ]
    assert usable[0] == usable[1] and len(usable[0]) > 2


def test_none_can_be_written_where_there_is_no_null(tmp_path, monkeypatch):
    (tmp_path / "turbo.toml").write_text('preset = "max_speed"\nvram_budget = "None"\n[flow]\nsteps = "none"\n')
    config = resolve(tmp_path / "turbo.toml")
    assert (config.flow.steps, config.flow.prompt_seconds, config.vram_budget) == (None, 5.0, None)
    assert resolve({"preset": "none", "quantization": {"t3": "none"}}).quantization.t3 == "none"
    monkeypatch.setenv("CHATTERBOX_TURBO__QUANTIZATION__T3", "none")
    monkeypatch.setenv("CHATTERBOX_TURBO__FLOW__PROMPT_SECONDS", "NULL")
    assert resolve(tmp_path / "turbo.toml").quantization.t3 == "none"
    assert resolve(tmp_path / "turbo.toml").flow.prompt_seconds is None
    with pytest.raises(InvalidConfigError, match=r"flow\.graphs"):
        resolve({"flow": {"graphs": "none"}})


@pytest.mark.parametrize(
    "name, content",
    [
        ("twice.toml", "[flow]\nsteps = 3\nsteps = 4\n"),
        ("deep.toml", f"a = {'[' * DEEP}{']' * DEEP}\n"),
        ("date.yaml", "decoding: !!timestamp abc\n"),
        ("deep.yaml", f"a: {'[' * DEEP}{']' * DEEP}\n"),
        ("deep.json", f'{{"a": {"[" * DEEP}{"]" * DEEP}}}'),
        ("number.yaml", "a: " + "9" * 5000),
        ("self.toml", "self = 1\n"),
        ("keys.yaml", "decoding: {1: 2}\n"),
        ("numbers.yaml", "1: 2\n"),
        ("false.yaml", "false\n"),
        ("large.yaml", f"vram_budget: {10**400}\n"),
        ("nines.toml", f'memory_budget = "{"9" * 400}"\n'),
        ("terabytes.json", f'{{"memory_budget": "{"9" * 300}TB"}}'),
        ("debt.yaml", f"vram_budget: -{10**400}\n"),
        ("share.yaml", f'vram_budget: "{"9" * 400}%"\n'),
        ("below.yaml", f"offload: {{free_below: {10**400}}}\n"),
        ("pauses.yaml", "text: {pauses: {word: .nan}}\n"),
    ],
)
def test_whatever_a_file_holds_the_error_names_it(tmp_path, capsys, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InvalidConfigError) as caught:
        resolve(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
    assert main(["inspect", "--config", str(path)]) == 2
    assert name in capsys.readouterr().err.replace("\n", "")


def test_a_word_that_begins_as_a_boolean_is_a_word(tmp_path):
    (tmp_path / "turbo.yaml").write_text("fidelity: lossy\nvocoder: {kind: vocos, checkpoint: falsework/v1}\n")
    assert resolve(tmp_path / "turbo.yaml").vocoder.checkpoint == "falsework/v1"


@pytest.mark.parametrize("word, meant", [("off", False), ("no", False), ("on", True), ("yes", True), ("true", True)])
def test_words_of_yaml_are_what_a_key_takes_them_for(tmp_path, word, meant):
    path = tmp_path / "turbo.yaml"
    path.write_text(f"flow: {{graphs: {word}, enabled: {word}}}\n")
    config = resolve(path)
    assert config.flow.graphs is meant and config.flow.enabled is meant
    path.write_text(
        "offload: {mode: off}\nwarmup: {level: off}\ndecoding: {progress: off}\nprecision: {autocast: off}\n"
    )
    config = resolve(path)
    assert (config.offload.mode, config.warmup.level, config.decoding.progress) == ("off", "off", "off")
    assert config.precision.autocast is False


@pytest.mark.parametrize("word", ["false", "False", "0", "off"])
def test_autocast_can_be_turned_off_by_the_environment(monkeypatch, word):
    monkeypatch.setenv("CHATTERBOX_TURBO__PRECISION__AUTOCAST", word)
    assert resolve("fast").precision.autocast is False
    monkeypatch.setenv("CHATTERBOX_TURBO__PRECISION__AUTOCAST", "true")
    with pytest.raises(InvalidConfigError, match="CHATTERBOX_TURBO__PRECISION__AUTOCAST"):
        resolve("fast")


@pytest.mark.parametrize(
    "suffix, text",
    [(".toml", "fidelity = 'exact'\n"), (".yaml", "fidelity: exact\n"), (".json", '{"fidelity": "exact"}')],
)
def test_a_mark_of_the_byte_order_is_no_part_of_a_file(tmp_path, suffix, text):
    path = tmp_path / f"turbo{suffix}"
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert resolve(path).fidelity == "exact"
