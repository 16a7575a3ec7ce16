"""``bench --matrix``: configurations side by side, rows that fail, an interrupt, the table and the picture."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from itertools import pairwise

import pytest
from cases import recording
from cli_tools import error, started

import chatterbox_turbo as turbo
from chatterbox_turbo.cli.matrix import _quality, legend, matrix_table, rows_named
from chatterbox_turbo.config.presets import PRESETS
from chatterbox_turbo.measure import matrix as side_by_side
from chatterbox_turbo.measure.fidelity import sample
from chatterbox_turbo.measure.halves import quality_of, reference_of
from chatterbox_turbo.measure.matrix import EndedError, Matrix, Row
from chatterbox_turbo.measure.worker import Job, Worker

QUIET = {"decoding": {"progress": "off", "kernel": "torch"}}


def test_rows():
    """Every preset by default; additions behind a +; upstream in any case."""
    rows = rows_named([], None)
    assert list(rows) == ["upstream", *PRESETS, "auto+autocast"]
    assert rows["upstream"] is None and rows["auto+autocast"].precision.autocast == "bfloat16"
    assert all(config.decoding.progress == "off" for config in rows.values() if config)
    rows = rows_named(["fast+discard+idle,exact", "upstream"], None)
    assert list(rows) == ["upstream", "fast+discard+idle", "exact"]
    chosen = rows["fast+discard+idle"]
    assert (chosen.precision.t3, chosen.precision.originals, chosen.offload.mode) == ("auto", "discard", "idle")


def test_a_file_is_a_row(tmp_path):
    (tmp_path / "mine.toml").write_text('fidelity = "exact"\n')
    rows = rows_named([], tmp_path / "mine.toml")
    assert list(rows) == ["upstream", *PRESETS, "auto+autocast", "mine.toml"] and rows["mine.toml"].fidelity == "exact"
    assert list(rows_named(["upstream"], tmp_path / "mine.toml")) == ["upstream", "mine.toml"]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--matrix", "--presets", "fats"), ["Unknown preset 'fats'"]),
        (("--matrix", "--presets", "fast+speed"), ["unknown addition 'speed'", "idle, sequential"]),
        (("--matrix", "--preset", "fast"), ["--presets"]),
        (("--presets", "fast"), ["--matrix"]),
        (("--matrix", "--plot", "{folder}/none/a.png"), ["cannot write"]),
    ],
)
def test_misuse(capsys, tmp_path, no_hub, arguments, fragments):
    code, line = error(capsys, "bench", *(argument.format(folder=tmp_path) for argument in arguments))
    assert code == 2
    for fragment in fragments:
        assert fragment in line


@pytest.mark.exhaustive
def test_the_command_and_an_interrupt(tmp_path, saved):
    """Processes of their own, in turns; what was measured before an interrupt is printed, written and drawn."""
    rows = ["--presets", "fast,exact,auto", "--json", "m.json", "--plot", "m.png"]
    folder = ["--checkpoint", str(saved("english")), "--size", "tiny"]
    command = ["bench", "--matrix", *folder, *rows]
    running = started(tmp_path, *command, CHATTERBOX_TURBO__DECODING__KERNEL="torch")
    end = time.monotonic() + 900
    while running.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
        if (tmp_path / "m.json").exists() and '"name": "fast"' in (tmp_path / "m.json").read_text():
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the processes of its rows as well
            break
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    data = json.loads((tmp_path / "m.json").read_text())
    upstream, fast = data["rows"]
    assert (upstream["name"], fast["name"], data["interrupted"]) == ("upstream", "fast", True)
    assert "interrupted after 2 of 4 rows" in err and "fast: speaking" in err
    for row in (upstream, fast):
        assert 0 < row["resident"] <= row["peak"] < 2e9 and row["imports"] > 1e8
        assert row["real_time_factor"] > 0 and not row["failure"]
    assert upstream["quality"] is None and upstream["speed"] == 1.0
    assert fast["turns"][0] != upstream["runs"][0]["end_to_end"] and fast["speed"] > 0
    assert fast["promise"] in ("numerical", "lossy")  # as the processor has half precision
    assert fast["quality"]["divergence"]["steps"] == upstream["runs"][0]["tokens"]
    assert "upstream" in out and "fast" in out and "resident memory of a process of its own" in out
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_told_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    from chatterbox_turbo.cli import matrix

    monkeypatch.setattr(matrix, "version", lambda name: None)
    code, line = error(capsys, "bench", "--matrix", "--synthetic", "--plot", str(tmp_path / "m.png"))
    assert code == 2 and "--plot needs matplotlib" in line


@pytest.mark.exhaustive
def test_sigterm_leaves_no_checkpoint_behind(tmp_path):
    """Of random weights, which lie in the temporary folder meanwhile; a full-size one has 3.2 GB."""
    arguments = ["bench", "--matrix", "--synthetic", "--size", "tiny", "--presets", "exact"]
    running = started(tmp_path, *arguments, TMPDIR=str(tmp_path))
    end = time.monotonic() + 300
    while running.poll() is None and time.monotonic() < end and not list(tmp_path.glob("chatterbox-turbo-*/*")):
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert not list(tmp_path.glob("chatterbox-turbo-*"))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise RuntimeError("this cannot be loaded")


def test_processes_that_end(tmp_path):
    """A row has the reason, and there are more rows; without upstream there is nothing to compare with."""

    def job(config):
        prepare = die if config is None else refuse
        return Job(prepare, prepare, config, {}, 0, "cpu")

    with Matrix(job) as processes:
        upstream, other = processes.rows({"upstream": None, "other": turbo.OptimizationConfig()})
    assert "for want of memory" in upstream.failure
    assert other.failure == "RuntimeError: this cannot be loaded" and other.speed is None and other.peak is None
    assert "failed" in rendered([upstream, other])


class InThisProcess:
    """A process that is none: the same worker, on a model that is here; one that has no room the first time."""

    rooms = {"exact": 1}  # tries that fail, by preset
    open = 0

    def __init__(self, job):
        if job.config is not None and self.rooms.get(job.config.preset):
            self.rooms[job.config.preset] -= 1
            raise EndedError("no room", out_of_memory=True)
        self.worker = Worker(job)
        self.facts = self.worker.facts()
        type(self).open += 1

    def ask(self, name, *arguments):
        return getattr(self.worker, name)(*arguments)

    def close(self):
        turbo.revert(self.worker._model)
        type(self).open -= 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def test_no_room_beside_upstream(fresh, monkeypatch):
    """Upstream's process goes, the row is measured alone, and it says so."""
    monkeypatch.setattr(side_by_side, "Process", InThisProcess)
    request = {"text": "Yes, and no."}

    def job(config):
        return Job(lambda: None, partial(fresh, "english"), config, request, 0, "cpu")

    lines = []
    with Matrix(job, 1, lines.append) as processes:
        upstream, exact = processes.rows({"upstream": None, "exact": turbo.OptimizationConfig(preset="exact", **QUIET)})
        assert InThisProcess.open == 0
    assert "exact: no room beside upstream, once more without it" in lines
    assert exact.turns == [upstream.runs[0]["end_to_end"]] and "not in turns" in exact.notes[0]
    assert exact.speed == pytest.approx(upstream.runs[0]["end_to_end"] / exact.runs[0]["end_to_end"])
    assert exact.quality["comparison"]["watermarked"] and exact.quality["snr_db"] == float("inf")


@pytest.mark.parametrize("family", ["english", "turbo", "vc"])
def test_halves_given_upstreams_tokens(fresh, family):
    """Exact is equal in both halves; half precision is near; a rough half shows in its own figures only."""
    model = fresh(family)
    request = {"audio": recording(1.0)} if family == "vc" else {"text": "Yes, and no."}
    configs = {"exact": {"preset": "exact"}}
    if family == "english":
        # lossy on every processor
        configs["fast"] = {"preset": "fast", "quantization": {"t3": "int8", "strategy": "aggressive"}}
        configs["rough"] = {"fidelity": "lossy", "flow": {"steps": 1}}
    reference, found = reference_of(model, request, 3), {}
    for name, config in configs.items():
        with turbo.optimized(model, {**config, **QUIET}):
            found[name] = quality_of(model, request, 3, sample(model, 3, request), reference)
    exact = found["exact"]
    assert exact.snr_db == float("inf") and exact.log_mel == 0 and exact.comparison.first_mismatch is None
    if family == "vc":
        assert exact.divergence is None
        return
    assert exact.divergence.steps == reference.sample.tokens.numel()
    assert exact.divergence.agreement == 1 and abs(exact.divergence.mean) < 1e-9
    if family == "english":
        fast, rough = found["fast"], found["rough"]
        assert 20 < fast.snr_db < 120 and 0 < fast.log_mel < 0.2
        assert rough.snr_db < fast.snr_db and rough.log_mel > fast.log_mel
        assert abs(rough.divergence.mean) < 1e-9 < fast.divergence.mean


def test_a_model_whose_t3_is_upstreams(fresh):
    """Its half is not asked; samples of given tokens are."""
    model, request = fresh("english"), {"text": "Yes, and no."}
    reference = reference_of(model, request, 3)
    with turbo.optimized(model, {"decoding": {"enabled": False}}):
        found = quality_of(model, request, 3, sample(model, 3, request), reference)
        assert model.turbo.renewals == ()
    assert found.divergence is None and found.snr_db > 60
    assert "inference" not in vars(model.t3)


def test_what_is_left_out_is_told(fresh):
    job = Job(
        lambda: None,
        partial(fresh, "english"),
        turbo.OptimizationConfig(offload={"mode": "idle", "folder": "/nowhere"}, **QUIET),
        {"text": "Yes."},
        0,
        "cpu",
    )
    model = fresh("english")
    try:
        notes = Worker(job).facts()["notes"]
    finally:
        turbo.revert(model)
    assert len(notes) == 1 and notes[0].startswith("offload left out: /nowhere")


def rendered(rows, width=80):
    from rich.console import Console

    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as shown:
        console.print(matrix_table(rows))
    return shown.get()


def row(name, **values):
    span = {"least": int(1e9), "median": int(2e9), "most": int(3e9)}
    run = {"memory": {"t3": span}, "peak_memory": 3e9 / 2**20, "real_time_factor": 4.0, "end_to_end": 2.0, "tokens": 9}
    quality = {
        "comparison": {"token_agreement": 1.0},
        "divergence": {"agreement": 0.991, "mean": 4e-4, "steps": 9},
        "snr_db": 42.4,
        "log_mel": 0.0101,
    }
    return Row(name, imports=int(5e8), runs=[run], turns=[10.0], quality=quality, promise="numerical", **values)


def test_the_table_fits_a_terminal():
    shown = rendered([Row("low_vram+sequential", failure="no"), row("low_vram+sequential")])
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.splitlines()[2].split() == [
        *("low_vram+sequential", "1.50", "2.50", "4.00", "5.00x", "numerical", "99.1%", "4e-04", "42")
    ]
    assert len(shown.splitlines()) == 3
    assert _quality({"divergence": None, "snr_db": float("-inf")}) == ("", "", "length")
    assert any("0.50 GB of its imports" in line for line in legend("cpu", [row("a")]))
    assert any("allocated on the device" in line for line in legend("cuda", [row("a")]))


def test_labels_do_not_lie_on_each_other():
    from chatterbox_turbo.cli.matrix_plot import LINE, Point, label_heights

    points = [Point(str(n), 1.0, 2.0, 1.0 + 0.01 * n, "exact") for n in range(5)] + [Point("far", 1, 9.0, 1.0, "exact")]
    *near, far = label_heights(points, 3.0)
    assert all(b - a > 0.99 * LINE * 3.0 for a, b in pairwise(sorted(near)))
    assert far == 1.0
