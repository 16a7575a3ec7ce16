"""``serve`` under requests that Hypothesis makes; ``python tests/serve_fuzz.py`` sends ten thousand."""

from __future__ import annotations

import pytest
from cases import require
from serve_fuzz import Watch, fuzz, send
from serve_tools import serving

import chatterbox_turbo as turbo
from chatterbox_turbo.server.app import SpeechServer


def test_no_request_has_the_server_fail_or_open_a_file_outside_its_folder(models, tmp_path, monkeypatch):
    require("turbo")
    model, folder = models("turbo"), tmp_path / "voices"
    folder.mkdir()
    with turbo.optimized(model, {"decoding": {"progress": "off", "kernel": "torch"}}):
        with serving(model, folder, text=60, voices=3) as running:
            found = fuzz(running, folder, 60, Watch())
        assert found.total() >= 60 and len(found) > 3
        monkeypatch.setattr(SpeechServer, "models", lambda self: 1 / 0)  # and a failure would be seen
        with serving(model) as running, running.client() as client, pytest.raises((AssertionError, TypeError)):
            send(running, client, ("GET", "/v1/models", {}, b""))
