"""`chatterbox-turbo run`, and the file that `enable` writes: real processes, few of which import torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from cli_tools import ROOT, command, error, started

from chatterbox_turbo.cli import main
from chatterbox_turbo.cli.checks import launcher
from chatterbox_turbo.errors import TurboError
from chatterbox_turbo.launch import site_file
from chatterbox_turbo.launch.program import ON_PATH, beside, environment, interpreter_options, unreachable

HOOKED = "'chatterbox_turbo.launch.hooks' in sys.modules"


@pytest.mark.parametrize("line, interpreters", [
    ("server.py -u --port 1", ""),
    ("-u -X dev server.py -O", "-u -X dev"),
    ("-Xdev -W error -Werror -m uvicorn -O", "-Xdev -W error -Werror"),
    ("-m uvicorn", ""),
    ("-muvicorn -u", ""),
    ("-Oum uvicorn -B", "-Ou"),
    ("-OW error a.py", "-OW error"),
    ("-c pass -E", ""),
    ("- -E", ""),
    ("-E -- -S", "-E"),
    ("--check-hash-based-pycs never -I a.py -S", "--check-hash-based-pycs never -I"),
    ("--version", "--version"),
    ("-X", "-X"),
    ("", ""),
])  # fmt: skip
def test_options_of_the_interpreter_are_told_from_the_programs(line, interpreters):
    assert " ".join(interpreter_options(line.split())) == interpreters


@pytest.mark.parametrize("options, enabled, reason", [
    ("-u -X dev", False, ""),
    ("-XEIS -WE", False, ""),
    ("-uE", False, "enable"),
    ("-I", False, "enable"),
    ("-I", True, ""),
    ("-SB", True, "-S"),
])  # fmt: skip
def test_options_that_keep_the_launcher_out_are_known(options, enabled, reason):
    found = unreachable(options.split(), enabled)
    assert reason in found and bool(found) == bool(reason)


def test_a_program_gets_two_variables_and_what_was_there():
    found = environment("fast", False, {"PYTHONPATH": f"a{os.pathsep}b", "HOME": "c"})
    assert found == {"PYTHONPATH": os.pathsep.join([str(ON_PATH), "a", "b"]), "HOME": "c", "CHATTERBOX_TURBO": "fast"}
    assert environment("fast", True, found) == {**found, "CHATTERBOX_TURBO_STRICT": "1"}  # once on the path
    assert environment("fast", False, {})["PYTHONPATH"] == str(ON_PATH)


LOOK = """
import os, sys
import multiprocessing

def child():
    print(HOOKED, __name__, flush=True)

class Mine(Exception):
    pass

def main():
    print(sys.argv, sys.path[0], __name__, sys.flags.optimize, sys.flags.utf8_mode, sys.flags.dev_mode, __spec__)
    print(sys.modules["__main__"].__dict__ is globals(), globals().get("__file__"), sys.stdin.read())
    print(len(sys.path), "sitecustomize_of_mine" in sys.modules, flush=True)
    if "spawn" in sys.argv:
        process = multiprocessing.get_context("spawn").Process(target=child)
        process.start()
        process.join()
    if "exit" in sys.argv:
        sys.exit(7)
    if "message" in sys.argv:
        sys.exit("a message")
    if "interrupt" in sys.argv:
        os.kill(os.getpid(), 2)
    raise Mine("by itself")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("arguments", [
    ["-X", "dev", "look.py", "spawn", "--help", "--", "-u"],
    ["-O", "-m", "look", "exit", "--preset"],
    ["look.py", "message"],
    ["folder", "interrupt"],
    ["nowhere.py"],
    ["-m", "nowhere"],
], ids=lambda arguments: " ".join(arguments))  # fmt: skip
def test_a_program_runs_as_without(tmp_path, arguments):
    """The same output, traceback and exit code; an environment's own sitecustomize runs as well."""
    (tmp_path / "look.py").write_text(LOOK.replace("HOOKED", HOOKED))
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "look.py", tmp_path / "folder" / "__main__.py")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import sys; sys.modules['sitecustomize_of_mine'] = sys")
    path = os.pathsep.join([str(ROOT), str(tmp_path / "own")])
    given = {"cwd": tmp_path, "input": "typed", "capture_output": True, "text": True, "timeout": 300}
    given["env"] = {**os.environ, "PYTHONPATH": path}
    without = subprocess.run([sys.executable, *arguments], **given)
    launch = [sys.executable, "-m", "chatterbox_turbo.cli", "run", "--preset", "fast", "--", *arguments]
    within = subprocess.run(launch, **given)
    assert within.returncode == without.returncode != 0
    assert within.stderr == without.stderr
    assert within.stdout.replace("True __mp_main__", "False __mp_main__") == without.stdout
    assert (within.stdout != without.stdout) == ("spawn" in arguments)
    assert "sitecustomize" not in within.stderr and ("nowhere" in arguments[-1] or "True" in within.stdout)


SPEAKS = """
import sys, threading
from chatterbox.tts import ChatterboxTTS
from chatterbox_turbo import synthetic

def load():
    with synthetic.architecture("tiny"):
        model = ChatterboxTTS.from_local(sys.argv[1], "cpu")
    print("optimized" if hasattr(model, "turbo") else "as it is", flush=True)

load()
thread = threading.Thread(target=load)
thread.start()
thread.join()
print("end")
"""


def test_models_of_a_program_are_optimized_where_they_can_be(tmp_path, saved):
    (tmp_path / "speaks.py").write_text(SPEAKS)
    (tmp_path / "turbo.toml").write_text('preset = "exact"\n')
    given = ["--config", "turbo.toml", "--", "speaks.py", str(saved("english"))]
    done = command(tmp_path, "run", "--strict", *given, CHATTERBOX_TURBO_REPORT="reports.jsonl")
    assert (done.returncode, done.stdout) == (0, "optimized\noptimized\nend\n"), done.stderr
    assert "chatterbox-turbo:" not in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    assert [(line["program"], line["config"]["preset"]) for line in lines] == [("speaks.py", "exact")] * 2


def test_a_strict_program_ends_in_any_thread(tmp_path, saved):
    (tmp_path / "turbo.toml").write_text("alignment = { enabled = true }\n")
    lines = SPEAKS.replace("\nload()\n", "\n")  # only in a thread, which could not end it by an exception
    (tmp_path / "speaks.py").write_text(lines)
    done = command(tmp_path, "run", "--config", "turbo.toml", "--strict", "speaks.py", str(saved("english")))
    assert (done.returncode, done.stdout) == (1, "")
    said = [line for line in done.stderr.splitlines() if line.startswith("chatterbox-turbo:")]
    assert len(said) == 1 and "alignment" in said[0] and "as --strict asks for" in said[0]


def test_another_package_of_that_name_and_a_class_that_is_none_run_as_without(tmp_path):
    """A fork whose classes have no loader to wrap, one whose model is unknown, and one without the class."""
    folder = tmp_path / "chatterbox"
    folder.mkdir()
    (folder / "__init__.py").touch()
    loader = "class {}:\n  @classmethod\n  def from_local(cls, folder, voice=None): return [folder, voice]\n"
    (folder / "tts.py").write_text("class ChatterboxTTS:\n  def load(self): return 'loaded'\n")
    (folder / "vc.py").write_text(loader.format("ChatterboxVC"))
    (folder / "mtl_tts.py").write_text("ChatterboxMultilingualTTS = None\n")
    lines = [
        "from chatterbox import tts, vc, mtl_tts",
        "print(tts.ChatterboxTTS().load(), *(vc.ChatterboxVC.from_local('a', voice='b') for _ in range(2)))",
    ]
    (tmp_path / "program.py").write_text("\n".join(lines))
    done = command(tmp_path, "run", "program.py", CHATTERBOX_TURBO="exact")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded ['a', 'b'] ['a', 'b']\n"
    bare, none, unknown = [line for line in done.stderr.splitlines() if line.startswith("chatterbox-turbo:")]
    assert "neither from_pretrained nor from_local" in bare
    assert "no class ChatterboxMultilingualTTS" in none and "is not a chatterbox model" in unknown


def test_ctrl_c_ends_a_program_as_without(tmp_path):
    (tmp_path / "waits.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    process = started(tmp_path, "run", "waits.py")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)  # the program has the command's process id
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert stderr.splitlines()[-1] == "KeyboardInterrupt" and "chatterbox_turbo" not in stderr


def test_what_reloads_itself_is_concerned_too(tmp_path):
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "app.py").write_text(
        "import sys\n"
        "async def app(scope, receive, send):\n"
        f"    body = str({HOOKED}).encode()\n"
        "    await send({'type': 'http.response.start', 'status': 200, 'headers': []})\n"
        "    await send({'type': 'http.response.body', 'body': body})\n"
    )
    arguments = ["-m", "uvicorn", "--reload", "--lifespan", "off", "--port", str(port), "app:app"]
    process = started(tmp_path, "run", *arguments)
    try:
        until = time.monotonic() + 200
        while True:
            try:
                assert urlopen(f"http://127.0.0.1:{port}/", timeout=60).read() == b"True"
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.3)
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # of the session that was started for it
        process.communicate(timeout=60)


def test_misuse_of_run_is_told(capsys, tmp_path):
    for arguments, words in (
        (["run"], "name a program"),
        (["run", "--preset", "fasst", "server.py"], "Unknown preset 'fasst'"),
        (["run", "--preset", "fast", "--config", __file__, "server.py"], "either --preset or --config"),
        (["run", "--strict", "--", "-I", "server.py"], "chatterbox-turbo enable"),
    ):
        code, line = error(capsys, *arguments)
        assert code == 2 and words in line


def test_where_no_process_can_take_anothers_place_it_runs_beside():
    with pytest.raises(SystemExit) as ended:
        beside([sys.executable, "-S", "-c", "import os; raise SystemExit(int(os.environ['CODE']))"], {"CODE": "5"})
    assert ended.value.code == 5


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
        assert (done.stdout, done.stderr) == ("True True\n", "")
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
