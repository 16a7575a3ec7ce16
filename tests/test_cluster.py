"""A job on Ray: one file a line, whoever is killed meanwhile; and what it is made of."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from cli_tools import ROOT, command, error, started
from cluster_tools import ray, ray_here
from serve_tools import wait

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.cluster import speak
from chatterbox_turbo.cluster.packing import pack
from chatterbox_turbo.cluster.spool import Spool
from chatterbox_turbo.errors import InvalidRequestError, TurboError
from chatterbox_turbo.speech.lines import Line, failed, speak_lines

QUIET = {"decoding": {"progress": "off", "kernel": "torch"}}
POISON = "Poison"


def model():
    return turbo.apply(synthetic.build("turbo", "tiny", stop_after=20), QUIET)


def lines_of(count: int) -> list[Line]:
    texts = ("One fox jumps over a dog." if number % 3 else "A fox." for number in range(count))
    return [
        Line(number, f"line {number}", {"text": text, "seed": number}, f"d{number}")
        for number, text in enumerate(texts, 1)
    ]


class Load:
    """What an actor loads; it leaves its process's number in a folder, and may end at a word."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self):
        loaded, several = model(), None
        several = loaded.turbo.as_completed

        def deadly(items, *arguments):
            def looked():
                for item in items:
                    if POISON in item["text"]:
                        os._exit(1)
                    yield item

            return several(looked(), *arguments)

        loaded.turbo.as_completed = deadly
        (self.folder / str(os.getpid())).touch()
        return loaded


@pytest.fixture(scope="module")
def cluster():
    with ray_here():
        yield


def test_batches_are_alike_the_longest_first_ever_smaller_and_hold_every_line_once():
    assert pack(range(7), [5.0, 1.0, 40.0, 6.0, 1.5, 2.0, 7.0], 3, 2) == [[2], [6], [3], [0], [5, 4], [1]]
    assert pack([], [], 3, 2) == [] and pack([7], [3.0], 3, 2) == [[7]]
    counts = [*map(len, pack(range(1000), [1.0] * 1000, 200, 2))]
    assert sum(counts) == 1000 and counts == sorted(counts, reverse=True) and counts[0] == 200 and counts[-2] == 62
    many = pack(range(1000), [1.0] * 1000, 32, 2)
    assert sorted(item for one in many for item in one) == [*range(1000)] and max(map(len, many)) == 32


def test_a_spool_tells_what_is_finished_and_what_was_begun(tmp_path):
    spool, (first, second, third) = Spool(tmp_path, "wav"), lines_of(3)
    spool.open()
    spool.begin(first)
    spool.begin(first)
    with spool.desk([first, second]) as desk:
        (desk / "line 1.wav").write_bytes(b"sound")
        spool.finish(first, {**failed(first, "wav", ""), "error": None}, desk)
        spool.finish(second, failed(second, "wav", "why"), desk)
    again = Spool(tmp_path, "wav")
    assert again.begun(first) == 2 and again.begun(second) == 0
    assert [line.name for line, _ in again.left_over([first, second])] == ["line 1", "line 2"]
    assert again.record(Line(1, "line 1", first.item, "of another text")) is None
    assert Spool(tmp_path, "flac").record(first) is None, "it is a WAV file"
    (tmp_path / "line 1.wav").unlink()
    assert again.record(first) is None and again.record(second)["error"] == "why"
    again.forget(first)
    assert again.begun(first) == 0 and not list(desk.parent.glob("*.wav"))
    # another job's actor is at work in the folder, and one of this job's was killed
    others = spool.desk([third])
    with others as desk:
        (desk.parent / "desk-left").mkdir()
        (desk.parent / "desk-left" / ".lines").write_text(again._key(second))
        spool.begin(third)
        again.clear([first, second])
        assert {path.name for path in desk.parent.iterdir()} == {desk.name, f"{spool._key(third)}.begun"}
    spool.clear([third])
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_each_line_has_one_file_though_an_actor_is_killed(cluster, tmp_path, count):
    out, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    lines, killed = lines_of(count), []

    def kill():
        wait(lambda: len(list(out.glob("*.wav"))) >= count // 6, 200)
        first = min(pids.iterdir(), key=lambda one: one.stat().st_mtime)
        os.kill(int(first.name), signal.SIGKILL)
        killed.append(len(list(out.glob("*.wav"))))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = list(speak(lines, out, Load(pids), slots=2, actors=2))
    killer.join()
    assert sorted(line.number for line, _ in found) == list(range(1, count + 1))
    assert all(record["error"] is None for _, record in found)
    assert sorted(path.name for path in out.iterdir()) == sorted(f"line {line.number}.wav" for line in lines)
    assert killed and killed[0] < count, "in the middle"
    here, alone = tmp_path / "here", lines[:: count // 4]
    here.mkdir()
    for _, record in speak_lines(model(), alone, here, "wav"):
        (one, _), (other, _) = (soundfile.read(folder / record["file"]) for folder in (here, out))
        assert len(one) == len(other) and np.abs(one - other).max() < 1e-3


@pytest.mark.exhaustive
def test_a_line_that_ends_its_process_fails_and_no_other(cluster, tmp_path):
    lines = lines_of(8)
    lines[3] = Line(4, "line 4", {"text": POISON, "seed": 1}, "poison")
    found = {line.number: record["error"] for line, record in speak(lines, tmp_path, Load(tmp_path), actors=2)}
    assert {number for number, why in found.items() if why} == {4} and len(found) == 8
    assert found[4] == "the process that speaks it has ended 4 times"
    assert len(list(tmp_path.glob("*.wav"))) == 7 and not (tmp_path / ".spool").exists()


def held() -> bool:
    """Whether a job is still at work here: what outlives it ends this process where Ray is shut down."""
    return any(thread.name.startswith("StreamingExecutor") for thread in threading.enumerate())


def test_what_stops_a_job_is_told_in_its_own_words(cluster, tmp_path):
    def broken():
        raise InvalidRequestError("There are no weights here.")

    def full():
        raise MemoryError("no room")

    for load, kind, words in (
        (broken, InvalidRequestError, r"^There are no weights here\.$"),
        (broken, InvalidRequestError, r"^There are no weights here\.$"),
        (full, TurboError, "An actor failed: MemoryError: no room.*do the same again"),
    ):
        with pytest.raises(kind, match=words):
            list(speak(lines_of(8), tmp_path, load))
        assert not held() and not list((tmp_path / ".spool").glob("*.begun")), "or lines would fail by themselves"
    with pytest.raises(InvalidRequestError, match="Ray has 2 CPUs and 0 GPUs, and an actor asks for 1 and 1"):
        list(speak(lines_of(2), tmp_path, broken, gpus=1))
    with pytest.raises(InvalidRequestError, match="Ray has 2 CPUs and 0 GPUs, and an actor asks for 16 and 0"):
        list(speak(lines_of(2), tmp_path, broken, cpus=16, actors=2))
    with pytest.raises(InvalidRequestError, match="slots is 0"):
        list(speak(lines_of(2), tmp_path, broken, slots=0))


def test_a_job_that_nobody_reads_on_gives_its_actors_back_and_goes_on_later(cluster, tmp_path):
    lines = lines_of(12)
    job = speak(lines, tmp_path / "out", Load(tmp_path), slots=2, actors=2)
    first, _ = next(job)
    assert held()
    job.close()
    assert not held()
    wait(lambda: ray.available_resources().get("CPU") == 2.0, 60)
    before = (tmp_path / "out" / f"{first.name}.wav").stat().st_mtime_ns
    assert len(list(speak(lines, tmp_path / "out", Load(tmp_path), slots=2, actors=2))) == 12
    assert (tmp_path / "out" / f"{first.name}.wav").stat().st_mtime_ns == before


def test_without_ray_it_says_what_to_install(tmp_path):
    code = f"""
import sys
sys.modules["ray"] = None
from pathlib import Path
from chatterbox_turbo.cluster import speak
list(speak([], Path({str(tmp_path)!r}), None))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "TurboError: ray.data cannot be imported" in result.stderr
    assert "pip install 'chatterbox-turbo[ray]'" in result.stderr


ARGUMENTS = ("--model", "turbo", "--synthetic", "--stop-after", "20", "--ray", "--config", "c.toml")


def write_rows(folder, count, **more):
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": f"n{number}", "text": "One fox.", "seed": number, **more} for number in range(count)]
    rows[0]["temperature"] = 0.5
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "p.parquet")
    (folder / "c.toml").write_text('decoding = {kernel = "torch"}\n')


@pytest.mark.exhaustive
def test_the_command_speaks_rows_of_parquet_and_goes_on_where_its_driver_was_killed(tmp_path):
    write_rows(tmp_path, 40)
    arguments = ("batch", "p.parquet", "-o", "out", *ARGUMENTS, "--slots", "2")
    first, out = started(tmp_path, *arguments), tmp_path / "out"
    wait(lambda: len(list(out.glob("*.wav"))) >= 5 or first.poll() is not None, 200)
    first.kill()
    first.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.wav")}
    assert 5 <= len(before) < 40
    time.sleep(1)
    result = command(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert " 0 failed" in result.stdout and "Ray: 2 CPUs" in result.stderr
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(one["id"] for one in records) == sorted(f"n{number}" for number in range(40))
    assert {path.name for path in out.iterdir()} == {*(f"n{number}.wav" for number in range(40)), "results.jsonl"}
    kept = sum(before[name] == (out / name).stat().st_mtime_ns for name in before)
    assert kept >= len(before) - 4, "what was finished is not spoken again, but for what the actors had in hand"
    assert command(tmp_path, *arguments).stdout.strip() == "out: all 40 lines are finished"


def test_a_cluster_that_does_not_answer(tmp_path, monkeypatch):
    write_rows(tmp_path, 3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        done = command(tmp_path, "batch", "p.parquet", "-o", "out", *ARGUMENTS)
    assert done.returncode == 1 and f"error: No Ray answers at {address}: " in done.stderr
    assert "unset RAY_ADDRESS" in done.stderr


def test_bad_rows_and_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, 3, tekst="x")
    code, line = error(capsys, "batch", "p.parquet", "-o", "out", *ARGUMENTS)
    assert code == 1 and "line 1: unknown key 'tekst' (did you mean 'text'?)" in line
    (tmp_path / "p.parquet").write_text("{}")
    code, line = error(capsys, "batch", "p.parquet", "-o", "out", *ARGUMENTS)
    assert code == 1 and "p.parquet is no Parquet file" in line
    code, line = error(capsys, "batch", "p.parquet", "-o", "out", "--actors", "2")
    assert code == 2 and "are for --ray" in line
