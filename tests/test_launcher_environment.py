"""What the launcher reads and writes: the environment, the file that `enable` puts into it, reports."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from cli_tools import ROOT, error
from test_launcher_processes import HOOKED

from chatterbox_turbo.cli import main
from chatterbox_turbo.cli.checks import launcher
from chatterbox_turbo.errors import TurboError
from chatterbox_turbo.launch import reports, site_file
from chatterbox_turbo.launch.program import ON_PATH
from chatterbox_turbo.launch.settings import Settings, from_environment


def test_settings_are_those_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_environment({}) is None and from_environment({"CHATTERBOX_TURBO": " "}) is None
    assert from_environment({"CHATTERBOX_TURBO__FIDELITY": "exact"}) is None
    assert from_environment({"CHATTERBOX_TURBO": "fast"}) == Settings("fast")
    given = {"CHATTERBOX_TURBO": "a.toml", "CHATTERBOX_TURBO_STRICT": "1", "CHATTERBOX_TURBO_REPORT": "r.jsonl"}
    assert from_environment(given) == Settings(str(tmp_path / "a.toml"), True, str(tmp_path / "r.jsonl"))
    assert not from_environment({**given, "CHATTERBOX_TURBO_STRICT": "0"}).strict


def test_reports_of_several_processes_are_whole_lines(tmp_path):
    path, line = str(tmp_path / "reports.jsonl"), b"x" * 200_000 + b"\n"
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                for _ in range(10):
                    reports._write(path, line)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = (tmp_path / "reports.jsonl").read_bytes().splitlines(keepends=True)
    assert len(found) == 40 and set(found) == {line}


def test_a_report_waits_for_whoever_writes_another(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "reports.jsonl"
    with open(path, "ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"half of a ")
        writer = threading.Thread(target=reports._write, args=(str(path), b"whole\n"))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and path.read_bytes() == b"half of a "
        other.write(b"line\n")
    writer.join(60)
    assert path.read_bytes() == b"half of a line\nwhole\n"


FULL_DISK = """
import resource, signal, sys
from chatterbox_turbo.launch import reports
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))  # the system writes what there is room for, as on a full disk
for number in range(4):
    try:
        reports._write(sys.argv[1], b"x" * 99 + b"\\n")
    except OSError as error:
        print(number, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of a file's size")
def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "reports.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, cwd=ROOT, check=True)
    assert path.read_bytes() == 2 * (b"x" * 99 + b"\n")
    assert done.stdout.splitlines() == ["2 no room for 100 bytes", "3 no room for 100 bytes"]


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Another folder as this environment's site-packages."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(site_file, "path", lambda: folder / site_file.NAME)
    monkeypatch.setattr("site.getsitepackages", lambda: [str(folder)])
    monkeypatch.setattr(site_file, "is_environment", lambda: True)
    monkeypatch.delenv("CHATTERBOX_TURBO", raising=False)
    return folder


def test_enabling_and_disabling_is_told_and_leaves_nothing(packages, capsys, monkeypatch):
    assert launcher().status == "ok" and "not enabled" in launcher().detail
    for words in ("enabled: ", "enabled already: "):
        assert main(["enable"]) == 0
        assert capsys.readouterr().out.startswith(f"{words}{packages}")
    assert [file.name for file in packages.iterdir()] == [site_file.NAME]
    assert launcher().status == "ok" and f"enabled: {packages}" in launcher().detail
    monkeypatch.setenv("CHATTERBOX_TURBO", "fasst")
    assert launcher().status == "warning" and "Unknown preset 'fasst'" in launcher().detail
    monkeypatch.setenv("CHATTERBOX_TURBO", "fast")
    assert launcher().status == "ok" and "CHATTERBOX_TURBO is fast" in launcher().detail
    (packages / site_file.NAME).write_text(site_file.CONTENT.replace("import os", "import os, sys"))
    assert launcher().status == "warning" and launcher().remedy == "chatterbox-turbo enable"
    assert main(["enable"]) == 0 and (packages / site_file.NAME).read_text() == site_file.CONTENT
    for words in ("removed: ", "not enabled: "):
        assert main(["disable"]) == 0
        assert words + str(packages) in capsys.readouterr().out
    assert not list(packages.iterdir())
    assert launcher().status == "warning" and "nothing looks for it" in launcher().detail


def test_where_the_file_cannot_be_the_reason_is_told(packages, monkeypatch, capsys):
    file = packages / site_file.NAME
    file.write_text("import something_else\n")
    for change in (site_file.enable, site_file.disable):
        with pytest.raises(TurboError, match="is not a file that"):
            change()
    assert file.read_text() == "import something_else\n"
    file.unlink()
    monkeypatch.setattr(site_file, "path", lambda: Path("/proc") / site_file.NAME)
    with pytest.raises(TurboError, match=r"does not read \.pth files in /proc.*site-packages"):
        site_file.enable()
    monkeypatch.setattr("site.getsitepackages", lambda: ["/proc"])
    code, line = error(capsys, "enable")
    assert code == 1 and "Cannot write to /proc: " in line and "chatterbox-turbo run" in line
    monkeypatch.setattr(site_file, "is_environment", lambda: False)
    for managed, words in ((True, "belongs to the system"), (False, "is no virtual environment")):
        monkeypatch.setattr(site_file, "is_managed", lambda managed=managed: managed)
        code, line = error(capsys, "enable")
        assert code == 1 and words in line and "--system" in line
    monkeypatch.setattr(site_file, "path", lambda: file)
    monkeypatch.setattr("site.getsitepackages", lambda: [str(packages)])
    assert main(["enable", "--system"]) == 0 and file.exists()


def test_an_enabled_environment_and_what_is_left_of_it(tmp_path):
    """A virtual environment that has this package by a path; taken away, its Pythons still start."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = next(environment.glob("[bS]*/python*"))
    (packages,) = environment.glob("[lL]ib/**/site-packages")
    (packages / "a.pth").write_text(
        f"{ROOT}\n" + "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    before = sorted(packages.iterdir())
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "CHATTERBOX"))}

    def run(*arguments, **variables):
        given = {"env": {**clean, **variables}, "capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path}
        return subprocess.run([python, *arguments], **given)

    look = f"import sys; print({HOOKED}, 'wrapt' in sys.modules)"
    assert "enabled: " in run("-m", "chatterbox_turbo.cli", "enable").stdout
    assert run("-c", look).stdout == "False False\n"
    for options in ([], ["-I"], ["-E"]):
        done = run(*options, "-c", look, CHATTERBOX_TURBO="nonsense")  # nobody has asked for a model
        assert (done.stdout, done.stderr) == ("True False\n", "")
    assert sorted(packages.iterdir()) != before
    kept = (packages / "a.pth").read_text()
    (packages / "a.pth").write_text("")  # as after pip uninstall
    done = run("-c", look, CHATTERBOX_TURBO="fast")
    assert done.stdout == "False False\n" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("chatterbox-turbo: ") and "No module named 'chatterbox_turbo'" in done.stderr
    assert run("-c", look).stderr == ""
    done = run(
        "-c", look, CHATTERBOX_TURBO="fast", PYTHONPATH=str(ON_PATH)
    )  # a program that `run` of another has started
    assert done.stdout == "False False\n" and "cannot import it, and runs without" in done.stderr
    (packages / "a.pth").write_text(kept)
    assert "removed: " in run("-m", "chatterbox_turbo.cli", "disable").stdout
    assert sorted(packages.iterdir()) == before
