"""``verify``: promises that are kept, and broken ones that are found."""

from __future__ import annotations

import json

import pytest
from cli_tools import command

from chatterbox_turbo.cli import main


def test_verify_keeps_its_promises(tmp_path):
    done = command(tmp_path, "verify", "--model", "turbo", "--texts", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    verdicts = {outcome["name"]: outcome["verdict"] for outcome in data["outcomes"]}
    expected = {"decoding": "kept", "alignment": "skipped", "watermark": "kept", "all together": "kept"}
    assert expected.items() <= verdicts.items() and "broken" not in verdicts.values()
    assert all(o["token_agreement"] == 1.0 and o["watermarked"] for o in data["outcomes"] if o["verdict"] == "kept")


def _damaging(damage):
    from contextlib import contextmanager

    from chatterbox_turbo.passes import Pass

    class Damaging(Pass):
        name = "damaging"

        def apply(self, context):
            @contextmanager
            def scope(call):
                yield
                call.result = damage(call.result)

            context.scopes.append(scope)
            return ""

    return Damaging()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda wav: wav * 0.9, "samples differ (20 dB SNR"),
        (lambda wav: wav * 0, "PerTh's detector does not find the watermark"),
        (lambda wav: wav[7], "raises IndexError"),
    ],
)
def test_verify_finds_a_broken_promise(english, damage, complaint):
    from chatterbox_turbo import OptimizationConfig
    from chatterbox_turbo.cli.verify import promises

    config = OptimizationConfig(decoding={"progress": "off"})
    found = promises(english, config, [{"text": "Hello."}], [0], passes=[_damaging(damage)])
    verdicts = {outcome.name: outcome for outcome in found}
    for name in ("damaging", "all together"):
        assert verdicts[name].verdict == "broken" and complaint in verdicts[name].detail
    assert verdicts["decoding"].verdict == "kept"  # each alone: the others are not to blame
    assert not hasattr(english, "turbo")


def test_verify_exits_with_1_where_a_promise_is_broken(prebuilt, capsys, monkeypatch):
    from chatterbox_turbo import api

    monkeypatch.setattr(api, "ALL_PASSES", (*api.ALL_PASSES, _damaging(lambda wav: wav * 0.9)))
    assert main(["verify", "--model", "english", "--texts", "1"]) == 1
    shown = capsys.readouterr().out
    assert "broken: samples differ" in shown and "every promise is kept" not in shown
