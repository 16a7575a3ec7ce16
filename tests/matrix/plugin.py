"""The plugin of pytest inside an environment: only the chosen tests, and what is installed and planned there.

``MATRIX_TOLD`` names the file that gets, as JSON, ``versions`` and ``plans``: status and reason of each pass under the
preset ``auto`` by family, or why there is no such model.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from .environments import read

PACKAGES = ("chatterbox-tts", "transformers", "torch", "torchaudio", "numpy", "numba", "safetensors", "setuptools")
FAMILIES = ("english", "multilingual", "turbo", "nano", "vc")


def chosen(name: str, expression: str) -> bool:
    """Whether a test's name, parameters included, is one of those that an expression means."""
    return re.search(expression, name) is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    tests = read()[2]
    kept = [item for item in items if chosen(item.name, tests[item.path.name])]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def _told(models):
    """Asked when all tests are done, of the models that they have built."""
    yield
    told = {"versions": versions(), "plans": {family: plan(models, family) for family in FAMILIES}}
    Path(os.environ["MATRIX_TOLD"]).write_text(json.dumps(told))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def plan(models, family: str) -> dict[str, dict[str, str]] | str:
    import chatterbox_turbo as turbo

    try:
        steps = turbo.inspect(models(family)).steps
    except pytest.skip.Exception as absent:
        return str(absent)
    return {step.name: {"status": step.status, "reason": step.reason} for step in steps}
