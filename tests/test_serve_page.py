"""The page of ``serve``, in a browser without a screen."""

from __future__ import annotations

import re
import shutil

import pytest
from cases import require
from serve_tools import serving

import chatterbox_turbo as turbo

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT = 120_000  # milliseconds


@pytest.fixture
def page():
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no browser here: {', '.join(BROWSERS)}")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=browser, args=["--no-sandbox", "--mute-audio"])
        made = started.new_page()
        made.set_default_timeout(WAIT)
        yield made
        started.close()


def test_one_types_listens_and_uploads_a_voice(models, page, voice, tmp_path):
    require("turbo")
    model, wrong, asked = models("turbo"), [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    with (
        turbo.optimized(model, {"decoding": {"progress": "off", "kernel": "torch"}}),
        serving(model, tmp_path, key="secret") as running,
    ):
        page.goto(running.url)
        page.get_by_text("Send Authorization").wait_for()
        wrong.clear()  # the browser's own line on that answer
        page.get_by_text("Key", exact=True).click()
        page.fill("#key", "secret")
        page.locator("#key").blur()
        page.wait_for_function("document.querySelectorAll('#voice option').length === 1")
        page.fill("#text", "A fox.")
        page.fill("#seed", "3")
        page.click("#go")
        page.get_by_text("Seed 3.").wait_for()
        first, factor, seconds = (page.inner_text(f"#{name}") for name in ("first", "factor", "seconds"))
        assert re.fullmatch(r"\d+\.\d\d s", first) and re.fullmatch(r"\d+\.\d\d", factor)
        assert float(seconds.removesuffix(" s")) == pytest.approx(15 * 0.04, abs=0.05)  # 12 tokens and Turbo's silence
        page.wait_for_function("document.getElementById('again').duration > 0.4")
        page.get_by_text("Another voice").click()
        page.fill("#name", "anna")
        page.set_input_files("#file", voice)
        page.get_by_role("button", name="Upload").click()
        page.get_by_text("There is a voice anna now.").wait_for()
        assert page.input_value("#voice") == "anna" and (tmp_path / "anna.safetensors").exists()
        page.click("#go")
        page.get_by_text("Seed 3.").wait_for()
        page.fill("#text", "…")
        assert not wrong
        page.click("#go")
        page.get_by_text("nothing to say").wait_for()
        assert page.is_enabled("#go")
        assert all(url.startswith((running.url, "data:", "blob:")) for url in asked)
