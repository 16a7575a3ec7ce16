"""What the tests of reading a book share: a book, and a model that reads it in short pieces.

Fixtures are taken by name: ``book, english = reading_tools.book, reading_tools.english``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import chatterbox_turbo as turbo
from chatterbox_turbo.speech import long_text, reading

CHAPTERS = """Chapter 1

One fox jumps over a dog. Is it two of them, or is it three?

Chapter 2

There will be more of them. Or there will be none of them at all.
"""
SETTINGS = {"decoding": {"progress": "off", "kernel": "torch"}, "text": {"retries": 0, "target": 1.5, "longest": 3.0}}
TOML = 'text = {retries = 0, target = 1.5, longest = 3.0}\ndecoding = {kernel = "torch"}\n'


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Six pieces in three waves; random weights end where they were told to, not where their text ends."""
    monkeypatch.setattr(reading, "WAVE", 2)
    monkeypatch.setattr(long_text, "MISSING", 0.0)
    path = tmp_path / "book.txt"
    path.write_text(CHAPTERS)
    return path


@pytest.fixture
def english(models):
    built = models("english")
    turbo.apply(built, SETTINGS)
    yield built
    turbo.revert(built)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
