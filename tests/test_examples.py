"""The example configuration names everything that can be configured."""

from __future__ import annotations

import re
from pathlib import Path

import tomlkit

from chatterbox_turbo import OptimizationConfig
from chatterbox_turbo.config import Section, resolve

TURBO_TOML = Path(__file__).parent.parent / "examples" / "turbo.toml"


def unnamed(data, model=OptimizationConfig, prefix=""):
    """Options of a configuration that ``data`` does not set, as dotted keys."""
    for key, option in model.model_fields.items():
        section = isinstance(option.annotation, type) and issubclass(option.annotation, Section)
        if section:
            yield from unnamed(data.get(key, {}), option.annotation, f"{prefix}{key}.")
        elif key not in data:
            yield prefix + key


def test_the_example_names_every_option():
    # options that are commented out have no value that does nothing
    text = re.sub(r"^# (\w+ = )", r"\1", TURBO_TOML.read_text(encoding="utf-8"), flags=re.MULTILINE)
    data = tomlkit.parse(text)
    assert list(unnamed(data)) == []
    del data["watermark"]["detect"], data["fidelity"]
    assert sorted(unnamed(data)) == ["fidelity", "watermark.detect"]
    assert resolve(TURBO_TOML).sections()
    assert OptimizationConfig(**{**data, "fidelity": "lossy"}).flow.steps == 5  # and those values are valid
