"""``verify``: promises that are kept, and broken ones that are found."""

from __future__ import annotations

import json

import pytest
from cli_tools import command, error

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.cli import main


@pytest.mark.exhaustive
def test_verify_keeps_its_promises(tmp_path):
    done = command(tmp_path, "verify", "--model", "turbo", "--texts", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    verdicts = {outcome["name"]: outcome["verdict"] for outcome in data["outcomes"]}
    expected = {"decoding": "kept", "alignment": "skipped", "watermark": "kept", "all together": "kept"}
    assert expected.items() <= verdicts.items() and "broken" not in verdicts.values()
    assert all(o["token_agreement"] == 1.0 and o["watermarked"] for o in data["outcomes"] if o["verdict"] == "kept")


QUICK = """
decoding: {kernel: torch}
quantization: {backend: torch}
""" + "".join(f"{name}: {{enabled: false}}\n" for name in ("flow", "vocoder", "conditioning", "watermark", "attention"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("quantized", [False, True], ids=["upstreams", "quantized"])
def test_verify_takes_a_checkpoint_folder(saved, capsys, tmp_path, quantized):
    folder = saved("english")
    if quantized:
        with synthetic.architecture("tiny"):
            folder = turbo.quantize("english", tmp_path / "int4", folder, scheme="int4", strategy="aggressive")
    (tmp_path / "quick.yaml").write_text(QUICK)
    options = ["--size", "tiny", "--texts", "1", "--config", str(tmp_path / "quick.yaml"), "--json", "-"]
    capsys.readouterr()
    code = main(["verify", "--checkpoint", str(folder), *options])
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    data = json.loads(shown.out)
    assert data["models"] == {"english": f"weights from {folder}"}
    verdicts = {outcome["name"]: outcome for outcome in data["outcomes"]}
    assert verdicts["decoding"]["verdict"] == "kept" and verdicts["decoding"]["token_agreement"] == 1.0


def test_verify_refuses_what_contradicts_a_checkpoint(saved, capsys, tmp_path):
    folder = str(saved("english"))
    for more, message in (
        (["--real"], "give either --real or --checkpoint"),
        (["--model", "english", "--model", "turbo"], "a --checkpoint is of one model"),
    ):
        code, line = error(capsys, "verify", "--checkpoint", folder, *more)
        assert code == 2 and message in line
    code, line = error(capsys, "verify", "--checkpoint", str(tmp_path))
    assert code == 1 and "is no checkpoint of a model that speaks" in line


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


@pytest.mark.exhaustive
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


def test_what_was_found_before_a_family_fails_is_told(prebuilt, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(QUICK.replace("{kernel: torch}", "{kernel: torch, enabled: true}"))
    models = ["--model", "vc", "--model", "english"]
    arguments = ["verify", *models, "--texts", "1", "--config", str(tmp_path / "c.yaml")]
    assert main([*arguments, "--json", str(tmp_path / "v.json")]) == 1
    shown = capsys.readouterr()
    data = json.loads((tmp_path / "v.json").read_text())
    assert "does not apply to ChatterboxVC" in data["failures"]["vc"] and "does not apply" in shown.err
    verdicts = {(outcome["family"], outcome["name"]): outcome["verdict"] for outcome in data["outcomes"]}
    assert verdicts["english", "decoding"] == "kept" and "all together" in shown.out
    assert "not everything was looked at: vc" in shown.out and "every promise is kept" not in shown.out
