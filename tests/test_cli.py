"""The command: what it writes, what it prints where, and its exit codes."""

from __future__ import annotations

import importlib.util
import json
import logging
import mmap
import os
import subprocess
import sys
import time
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from chatterbox_turbo.cli import main
from chatterbox_turbo.cli.screen import Screen
from chatterbox_turbo.errors import SpeechTruncatedWarning

ROOT = Path(__file__).parent.parent
METRICS = {"t3", "t3_step", "flow", "vocoder", "watermark", "end_to_end", "real_time_factor", "peak_memory"}


def command(folder: Path, *arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in its own process, with ``folder`` as the working directory."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "chatterbox_turbo.cli", *arguments],
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        # one thread: on a busy machine the threads of a tiny model mostly wait for each other
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


def watermark_in(path: Path) -> float:
    """Duration in seconds of an audio file that carries PerTh's mark, by PerTh's own detector."""
    import perth
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32")
    assert perth.PerthImplicitWatermarker().get_watermark(samples, sample_rate=rate).mean() == 1.0
    return len(samples) / rate


@pytest.fixture
def prebuilt(models, monkeypatch):
    """Commands in this process get the session's models instead of building theirs."""
    import chatterbox_turbo as turbo
    from chatterbox_turbo import synthetic

    used, real = [], synthetic.build

    def build(family, size="tiny", stop_after=None, seed=0, device="cpu"):
        with monkeypatch.context() as patch:
            patch.setattr(synthetic, "build", real)
            used.append(models(family))
        return used[-1]

    monkeypatch.setattr(synthetic, "build", build)
    yield
    for model in used:
        turbo.revert(model)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No cached weights, and a hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


# --- every sub-command, for real


def test_help_imports_neither_torch_nor_upstream():
    code = (
        "import sys; from chatterbox_turbo.cli import main; assert main(['--help']) == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'chatterbox', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_say_reads_standard_input_and_writes_marked_speech(tmp_path):
    done = command(tmp_path, "say", "-o", "hello.wav", "--synthetic", "--seed", "3", stdin="Hello there.\n")
    assert done.returncode == 0, done.stderr
    assert watermark_in(tmp_path / "hello.wav") == pytest.approx(24 / 25)
    assert "SYNTHETIC" in done.stdout and "watermark detected" in done.stdout
    for noise in ("Warning", "PerthNet", "Sampling"):
        assert noise not in done.stdout + done.stderr


def test_demo_writes_its_four_files_and_says_that_the_weights_are_random(tmp_path):
    arguments = ("demo", "--size", "tiny", "--out", "results", "--stop-after", "30")
    done = command(tmp_path, *arguments, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout and "no weights are cached" in done.stdout
    folder = tmp_path / "results"
    for name in ("upstream.wav", "optimized.wav"):
        assert watermark_in(folder / name) == pytest.approx(30 / 25)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = json.loads((folder / "report.json").read_text())
    assert report["command"] == f"chatterbox-turbo {' '.join(arguments)}"
    assert report["synthetic"] is True
    assert report["watermarked"] == {"upstream": True, "optimized": True}
    assert report["comparison"]["token_agreement"] == 1.0 and report["comparison"]["snr_db"] > 60
    assert set(report["metrics"]) == METRICS and report["unmatched"] == []
    assert {side: run["tokens"] for side, run in report["runs"][0].items()} == {"upstream": 31, "optimized": 31}
    assert {step["name"] for step in report["passes"] if step["status"] == "on"} >= {"decoding", "watermark"}


def test_bench_interleaves_pairs_and_says_where_it_ran(tmp_path, voice):
    done = command(
        tmp_path, "bench", "--size", "tiny", "--synthetic", "--runs", "2", "--voice", voice, "--json", "b.json"
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "b.json").read_text())
    assert set(data["metrics"]) == {*METRICS, "conditionals", "bandwidth_share"}
    for run in (run for pair in data["runs"] for run in pair.values()):
        assert run["memory_bandwidth_bytes_per_second"] > 1e8 and run["t3_bytes_per_token"] > 1e7
    assert len(data["runs"]) == 2
    assert {"torch", "transformers", "chatterbox-tts", "python"} <= set(data["versions"])
    assert {"cpu", "cores", "gpu"} <= set(data["machine"]) and data["date"]
    for name in ("T3, prefill included", "flow matching", "vocoder", "real-time factor", "share of memory bandwidth"):
        assert name in done.stdout
    assert data["command"] in done.stdout
    assert "run 2 of 2" in done.stderr and "run 2 of 2" not in done.stdout


def test_verify_keeps_its_promises(tmp_path):
    done = command(tmp_path, "verify", "--model", "turbo", "--texts", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    verdicts = {outcome["name"]: outcome["verdict"] for outcome in data["outcomes"]}
    expected = {"decoding": "kept", "alignment": "skipped", "watermark": "kept", "all together": "kept"}
    assert expected.items() <= verdicts.items() and "broken" not in verdicts.values()
    assert all(o["token_agreement"] == 1.0 and o["watermarked"] for o in data["outcomes"] if o["verdict"] == "kept")


def test_inspect_shows_the_plan(prebuilt, capsys):
    assert main(["inspect", "english", "--preset", "exact"]) == 0
    shown = capsys.readouterr().out
    assert "preset exact" in shown and "+ decoding" in shown
    assert "skipped: it does not apply to ChatterboxTTS" in shown


def test_doctor_names_the_remedy_where_pkg_resources_is_missing():
    code = "import sys; sys.modules['pkg_resources'] = None; from chatterbox_turbo.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    error = next(line for line in done.stdout.splitlines() if line.startswith("error"))
    assert "pkg_resources is missing" in error
    assert "pip install 'setuptools<81'" in done.stdout


def test_doctor_tells_what_upstream_cannot_be_imported_for(tmp_path):
    """As torchaudio does beside a torch for another CUDA: no ImportError."""
    (tmp_path / "torchaudio.py").write_text("raise RuntimeError('compiled with different CUDA versions')")
    command = [sys.executable, "-m", "chatterbox_turbo.cli", "doctor"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "compiled with different CUDA versions" in done.stdout


# --- the rest in this process


def test_presets(capsys):
    assert main(["presets"]) == 0
    table = capsys.readouterr().out
    assert "auto (default)" in table and "max_new_tokens" in table
    assert main(["presets", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["default"] == "auto" and data["presets"]["exact"]["config"]["fidelity"] == "exact"


def test_doctor_finds_every_patch_point(prebuilt, capsys):
    assert main(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert all(check["status"] != "error" for check in checks.values())
    for name in ("model english", "model multilingual", "model turbo", "model vc"):
        assert "patch points fit" in checks[name]["detail"]
    assert {"python", "torch", "cpu", "chatterbox-tts", "watermark", "environment", "matplotlib"} <= set(checks)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("ok      python")


def test_inspect_as_json(prebuilt, capsys):
    assert main(["inspect", "vc", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["family"] == "vc" and {step["name"]: step["status"] for step in data["passes"]}["watermark"] == "on"


def test_say_with_a_voice_and_a_config_file(prebuilt, capsys, tmp_path, voice):
    (tmp_path / "c.yaml").write_text("decoding: {max_new_tokens: 10}\n")
    out = tmp_path / "out.flac"
    arguments = ["say", "Hello.", "-o", str(out), "--synthetic", "--voice", voice, "--config", str(tmp_path / "c.yaml")]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert watermark_in(out) == pytest.approx(10 / 25)
    assert "warning: Speech was cut at 10 tokens" in shown.err  # ours comes through, upstream's does not


def test_say_is_the_same_for_the_same_seed(prebuilt, tmp_path):
    files = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    for file, seed in zip(files, "112", strict=True):
        assert main(["say", "Hello.", "-o", str(file), "--synthetic", "--seed", seed]) == 0
    same, again, other = (file.read_bytes() for file in files)
    assert same == again != other


def test_say_from_a_checkpoint_folder(capsys, tmp_path):
    from chatterbox_turbo import synthetic

    synthetic.save(tmp_path / "model", "multilingual", "tiny", 12)
    arguments = ["say", "Bonjour.", "--model", "multilingual", "--language", "fr", "--size", "tiny"]
    assert main([*arguments, "--checkpoint", str(tmp_path / "model"), "-o", str(tmp_path / "fr.wav")]) == 0
    assert watermark_in(tmp_path / "fr.wav") < 1.0
    assert "SYNTHETIC" not in capsys.readouterr().out


def test_say_takes_cached_weights_without_a_hub(no_hub, capsys, tmp_path):
    from chatterbox_turbo import synthetic

    repository = tmp_path / "cache" / "models--ResembleAI--chatterbox"
    synthetic.save(repository / "snapshots" / "0123", "english", "tiny", 12)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    with synthetic.architecture("tiny"):
        assert main(["say", "Hello.", "-o", str(tmp_path / "out.wav")]) == 0
    assert watermark_in(tmp_path / "out.wav") == pytest.approx(12 / 25)
    assert "SYNTHETIC" not in capsys.readouterr().out


def test_demo_of_voice_conversion(prebuilt, capsys, tmp_path):
    assert main(["demo", "--model", "vc", "--synthetic", "--size", "tiny", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["metrics"]) == METRICS - {"t3", "t3_step"}
    assert watermark_in(tmp_path / "optimized.wav") > 10


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


# --- errors: one line, with the way out


def _error(capsys, *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return code, lines[0]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("say", ""), ["text is empty", "standard input"]),
        (("say", "hi", "--model", "klingon"), ["klingon", "english"]),
        (("say", "hi", "--model", "vc"), ["vc converts speech"]),
        (("say", "hi", "--preset", "fats"), ["Unknown preset 'fats'", "Presets are: exact, auto"]),
        (("say", "hi", "--config", "{folder}/bad.toml"), ["bad.toml", "decoding.max_new_tokens", "'many'"]),
        (("say", "hi", "--config", "{folder}/typo.toml"), ["typo.toml", "decodign", "did you mean 'decoding'"]),
        (("say", "hi", "--config", "{folder}/none.toml"), ["none.toml", "does not exist"]),
        (("say", "hi", "--preset", "auto", "--config", "{folder}/bad.toml"), ["either --preset or --config"]),
        (("say", "hi", "--voice", "{folder}/none.wav"), ["none.wav", "does not exist"]),
        (("say", "hi", "-o", "{folder}/none/out.wav"), ["cannot write", "none/out.wav", "No such file"]),
        (("say", "hi", "-o", "{folder}/out.xyz"), ["unknown audio format '.xyz'"]),
        (("say", "hi", "--device", "cuda:99"), ["no device cuda:99"]),
        (("say", "hi", "--device", "abacus"), ["unknown device 'abacus'"]),
        (("say", "hi", "--language", "fr"), ["--language fr", "multilingual"]),
        (("say", "hi", "--model", "multilingual", "--language", "xx"), ["unknown language 'xx'", "fr"]),
        (("say", "hi", "--synthetic", "--checkpoint", "{folder}"), ["either --synthetic or --checkpoint"]),
        (("demo", "--text", " "), ["text is empty"]),
        (("demo", "--out", "{folder}/bad.toml"), ["bad.toml", "is a file"]),
        (("demo", "--model", "vc", "--stop-after", "9", "--out", "{folder}"), ["--stop-after"]),
        (("bench", "--json", "{folder}/none/b.json"), ["cannot write"]),
        (("bench", "--runs", "0"), ["--runs"]),
        (("verify", "--texts", "99"), ["--texts"]),
        (("dmeo",), ["dmeo"]),
        (("say", "hi", "--loud"), ["--loud"]),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, fragments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text('[decoding]\nmax_new_tokens = "many"\n')
    (tmp_path / "typo.toml").write_text("[decodign]\nenabled = true\n")
    code, line = _error(capsys, *(argument.format(folder=tmp_path) for argument in arguments))
    assert code == 2
    for fragment in fragments:
        assert fragment in line


def test_an_unwritable_output_leaves_nothing_behind(capsys, tmp_path):
    _error(capsys, "say", "hi", "-o", str(tmp_path / "out.wav"), "--preset", "none")
    assert list(tmp_path.iterdir()) == []


def test_say_does_not_fall_back_to_random_weights(no_hub, capsys, tmp_path):
    code, line = _error(capsys, "say", "hi", "-o", str(tmp_path / "out.wav"))
    assert code == 1
    assert "no weights for english" in line and "--synthetic" in line


def test_an_incomplete_checkpoint_folder(capsys, tmp_path):
    code, line = _error(capsys, "say", "hi", "-o", str(tmp_path / "out.wav"), "--checkpoint", str(tmp_path))
    assert code == 1 and "lacks a file" in line


def test_a_recording_that_is_none(prebuilt, capsys, tmp_path):
    (tmp_path / "voice.wav").write_text("not audio")
    arguments = ("say", "hi", "-o", str(tmp_path / "out.wav"), "--synthetic", "--voice", str(tmp_path / "voice.wav"))
    code, line = _error(capsys, *arguments)
    assert code == 1 and "is not" in line and "Convert it to WAV or FLAC" in line


def test_debug_shows_a_traceback_and_upstreams_chatter(prebuilt, capsys, tmp_path):
    (tmp_path / "voice.wav").write_text("not audio")
    arguments = ["say", "hi", "-o", str(tmp_path / "out.wav"), "--synthetic"]
    assert main(["--debug", *arguments, "--voice", str(tmp_path / "voice.wav")]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and "error: " in shown.splitlines()[-1]
    assert main(["--debug", *arguments]) == 0
    assert "Sampling" in capsys.readouterr().err


def test_the_command_without_arguments_shows_its_help(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("chatterbox-turbo ")


# --- parts


def test_names_of_models_and_sizes_are_the_packages():
    from chatterbox_turbo import synthetic
    from chatterbox_turbo.cli.options import ModelName, SizeName
    from chatterbox_turbo.upstream.families import FAMILIES

    assert tuple(name.value for name in ModelName) == FAMILIES
    assert tuple(name.value for name in SizeName) == synthetic.SIZES


def test_quiet_lets_only_our_warnings_through(capsys):
    screen = Screen([])
    with screen.quiet():
        print("upstream prints")
        print("upstream draws a bar", file=sys.stderr)
        warnings.warn("upstream is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("cut", SpeechTruncatedWarning, stacklevel=1)
        logging.getLogger("upstream").error("upstream logs")
        screen.print("a result")
    assert logging.root.manager.disable == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a result\n", "warning: cut\n")


def _run(seconds: float, tokens: int = 10):
    import torch

    from chatterbox_turbo.measure.benchmark import Run
    from chatterbox_turbo.measure.fidelity import Sample

    ids = torch.zeros(1, tokens, dtype=torch.int64)
    phases = {"t3": seconds / 2, "flow": seconds / 4}
    return Run(Sample(ids, torch.zeros(1, 24000), phases, seconds), 1.0, 2**20, seconds / 20, 1000, 1e5)


def test_ratios_are_medians_over_pairs():
    from chatterbox_turbo.measure.benchmark import Benchmark
    from chatterbox_turbo.measure.fidelity import Comparison

    pairs = [(_run(4), _run(2)), (_run(9), _run(3)), (_run(10), _run(10))]
    result = Benchmark(pairs, None, Comparison(1.0, None, 0.0, True), [0.0])
    metrics = {metric.name: metric for metric in result.metrics}
    end = metrics["end_to_end"]
    assert (end.ratio, end.upstream.median, end.upstream.min, end.upstream.max) == (2.0, 9, 4, 10)
    assert metrics["t3"].upstream.median == 450.0  # ms a token
    assert metrics["t3_step"].upstream.median == 450.0
    assert metrics["bandwidth_share"].optimized.median == pytest.approx(1000 / 0.15 / 1e5)
    assert result.unmatched == []


def test_peak_memory_sees_what_is_freed_again():
    import torch

    from chatterbox_turbo.measure.benchmark import peak_memory

    with peak_memory(torch.device("cpu")) as idle:
        pass
    # from the system, not from what the allocator has kept
    with peak_memory(torch.device("cpu")) as peak, mmap.mmap(-1, 200 * 2**20) as block:
        for start in range(0, len(block), 4096):
            block[start] = 1
        time.sleep(0.1)
    assert peak() - idle() > 100 * 2**20


def test_bytes_of_a_token_are_the_backbones_and_the_heads(english):
    from chatterbox_turbo.measure.benchmark import t3_bytes
    from chatterbox_turbo.upstream.families import identify

    layer = 4 * 1024 * 1024 + 3 * 1024 * 128 + 2 * 1024  # attention, MLP of 128, two norms
    assert t3_bytes(identify(english)) == 4 * (2 * layer + 1024 + english.t3.speech_head.weight.numel())


def test_a_warm_up_leaves_voice_and_generator(english, voice):
    import torch

    from chatterbox_turbo.measure.benchmark import warm_up

    before, conds = torch.get_rng_state(), english.conds
    warm_up(english, {"text": "Hello.", "audio_prompt_path": voice})
    assert torch.equal(torch.get_rng_state(), before) and english.conds is conds


def test_doctor_tells_a_vendored_copy(monkeypatch, tmp_path):
    from chatterbox_turbo.cli import checks

    assert checks.distribution().status != "error"
    (tmp_path / "chatterbox").mkdir()
    (tmp_path / "chatterbox" / "__init__.py").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    check = checks.distribution()
    assert check.status == "warning" and str(tmp_path) in check.detail and check.remedy
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert checks.distribution().status == "error"


def test_doctor_tells_a_fork_by_its_code(prebuilt, monkeypatch):
    from chatterbox.models.t3 import T3

    from chatterbox_turbo.cli.checks import patch_points

    def inference(
        self, *, t3_cond, text_tokens, max_new_tokens, temperature, top_p, min_p, repetition_penalty, cfg_weight
    ):
        return None

    inference.__module__ = "chatterbox.models.t3.t3"
    monkeypatch.setattr(T3, "inference", inference)
    found = list(patch_points("english"))
    assert [check.status for check in found] == ["warning"]
    assert "t3.inference" in found[0].detail and found[0].remedy
    monkeypatch.delattr(T3, "inference_turbo")
    assert [check.status for check in patch_points("turbo")] == ["error"]


def test_doctor_names_a_wrong_environment_variable(monkeypatch):
    from chatterbox_turbo.cli.checks import configuration

    monkeypatch.setenv("CHATTERBOX_TURBO__FIDELITY", "perfect")
    check = configuration()
    assert check.status == "error" and "CHATTERBOX_TURBO__FIDELITY" in check.detail
