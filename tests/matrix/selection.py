"""A plugin of pytest: only the tests that combinations.toml chooses."""

from __future__ import annotations

import re

import pytest

from .environments import read


def chosen(name: str, expression: str) -> bool:
    """Whether a test's name, parameters included, is one of those that an expression means."""
    return re.search(expression, name) is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    tests = read()[2]
    kept = [item for item in items if chosen(item.name, tests[item.path.name])]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
