"""`chatterbox-turbo run`, and the file that `enable` writes: real processes, few of which import torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from cli_tools import ROOT, command, error, started

from chatterbox_turbo.config import resolve
from chatterbox_turbo.launch.program import ON_PATH, beside, environment, interpreter_options, unreachable
from chatterbox_turbo.launch.settings import CONFIG, REPORT

HOOKED = "any(type(finder).__name__ == 'Waiting' for finder in sys.meta_path)"


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
    print(sys.argv, sys.path[0], __name__, sys.flags.optimize, sys.flags.utf8_mode, sys.flags.dev_mode)
    print(__spec__ and __spec__.name)
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


def own(output: str) -> list[str]:
    """Lines without what PerTh says of itself."""
    return [line for line in output.splitlines() if "PerthNet" not in line]


def test_models_of_a_program_are_optimized_where_they_can_be(tmp_path, saved):
    (tmp_path / "speaks.py").write_text(SPEAKS)
    (tmp_path / "turbo.toml").write_text('preset = "exact"\n')
    given = ["--config", "turbo.toml", "--", "speaks.py", str(saved("english"))]
    done = command(tmp_path, "run", "--strict", *given, CHATTERBOX_TURBO_REPORT="reports.jsonl")
    assert (done.returncode, own(done.stdout)) == (0, ["optimized", "optimized", "end"]), done.stderr
    assert "chatterbox-turbo:" not in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    assert [(line["program"], line["config"]["preset"]) for line in lines] == [("speaks.py", "exact")] * 2


def test_a_strict_program_ends_in_any_thread(tmp_path, saved):
    (tmp_path / "turbo.toml").write_text("alignment = { enabled = true }\n")
    lines = SPEAKS.replace("\nload()\n", "\n")  # only in a thread, which could not end it by an exception
    (tmp_path / "speaks.py").write_text(lines)
    done = command(tmp_path, "run", "--config", "turbo.toml", "--strict", "speaks.py", str(saved("english")))
    assert (done.returncode, own(done.stdout)) == (1, [])
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


def test_the_files_for_deployment_fit_this_package(tmp_path):
    folder = ROOT / "examples" / "deploy"
    assert resolve(folder / "turbo.toml").decoding.progress == "off"
    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["speech"]
    unit = (folder / "chatterbox.service").read_text()
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    docker = dict(
        line.split(" ", 1) for line in (folder / "Dockerfile").read_text().splitlines() if line[:3] in ("ENT", "CMD")
    )
    commands = [
        [*service["entrypoint"], *service["command"]],
        [*json.loads(docker["ENTRYPOINT"]), *json.loads(docker["CMD"])],
        [Path(shlex.split(line.partition("=")[2])[0]).name, *shlex.split(line)[1:]],
    ]
    for words in commands:
        assert words[:2] == ["chatterbox-turbo", "run"] and words[-2:] == ["--", "server.py"]
    named = {*service["environment"], *re.findall(r"\b(CHATTERBOX_TURBO\w*|NUMBA_\w+)=", unit + "\n".join(docker))}
    assert named == {CONFIG, REPORT, "CHATTERBOX_TURBO_CACHE", "NUMBA_CACHE_DIR"}
    if shutil.which("systemd-analyze"):
        (tmp_path / "chatterbox.service").write_text(
            unit.replace("/srv/chatterbox/.venv/bin/chatterbox-turbo", sys.executable)
        )
        done = subprocess.run(
            ["systemd-analyze", "verify", tmp_path / "chatterbox.service"], capture_output=True, text=True
        )
        assert done.returncode == 0 and "chatterbox.service" not in done.stderr, done.stderr


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


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP, by which torch computes on Linux")
def test_threads_of_a_program_wait_awake_unless_it_says_how():
    """As torch's OpenMP tells it; it asks the environment once, when it is loaded."""

    def told(**variables):
        given = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        given |= {"PYTHONPATH": os.pathsep.join([str(ON_PATH), str(ROOT)]), "OMP_DISPLAY_ENV": "VERBOSE", **variables}
        command = [sys.executable, "-c", "import torch"]
        lines = subprocess.run(command, env=given, capture_output=True, text=True, check=True).stderr
        found = {name: set(re.findall(rf"{name} = '(.*)'", lines)) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        if not found["OMP_WAIT_POLICY"]:
            pytest.skip("torch computes by another OpenMP here")
        return found

    assert told(CHATTERBOX_TURBO="auto") == {"OMP_WAIT_POLICY": {"ACTIVE"}, "GOMP_SPINCOUNT": {"300000"}}
    assert told()["OMP_WAIT_POLICY"] == {"PASSIVE"}  # as it calls what is neither
    assert told(CHATTERBOX_TURBO="auto", OMP_WAIT_POLICY="passive")["GOMP_SPINCOUNT"] == {"0"}
    assert told(CHATTERBOX_TURBO="auto", GOMP_SPINCOUNT="7")["GOMP_SPINCOUNT"] == {"7"}
