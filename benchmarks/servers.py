"""Chatterbox-TTS-Server and chatterbox-tts-api as they are, without and with the launcher, asked for the same.

    python benchmarks/servers.py FOLDER … [--requests 200] [--clients 4] [--each 25] [--output servers.json]
    python benchmarks/servers.py FOLDER --size full --stop-after 50 --presets fast --requests 5 --each 1 --reloads 0

A folder is a checkout of either. It is copied, and the copy runs in processes of its own on loopback, over a
synthetic checkpoint (tiny by default) in a Hugging Face cache without a network: once unoptimised and once for each of
``--presets``.
All of them run at once; the requests in a row are asked of each in turn, so that a machine that changes its speed does
so for all. What the servers import and this environment lacks may lie in a folder that ``--packages`` names; MP3 wants
ffmpeg on PATH. Prints Markdown, and writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import soundfile
from server_programs import NoSpeech, Program, ask, program_in

from chatterbox_turbo import synthetic

HERE = Path(__file__).parent
PLAIN = "unoptimised"
PATIENCE = 900  # seconds that a start or an answer may take


class Running:
    """A server's process, unoptimised or by the launcher, from its start until the ``with`` block ends."""

    def __init__(self, program: Program, checkout: Path, folder: Path, how: str, options: argparse.Namespace) -> None:
        self.program, self.how = program, how
        self.report, self.log = folder / "report.jsonl", folder / "log.txt"
        copy = folder / "program"
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "frontend", "node_modules"))
        recording = folder / "recording.wav"
        samples, rate = soundfile.read(synthetic.reference_voice(), dtype="int16")
        soundfile.write(recording, samples, rate)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._seeds, theirs = socket.socketpair()
        variables = {name: value for name, value in os.environ.items() if not name.startswith("CHATTERBOX_TURBO")}
        variables |= {
            "PYTHONPATH": os.pathsep.join(map(str, [HERE / "server_process", HERE.parent, *options.packages])),
            "HF_HUB_CACHE": str(folder.parent / "cache"),
            "HF_HUB_OFFLINE": "1",
            "CHATTERBOX_TURBO_REPORT": str(self.report),
            "SERVERS_PROGRAM": program.script,
            "SERVERS_SIZE": options.size,
            "SERVERS_SOCKET": str(theirs.fileno()),
            **program.configure(copy, port, recording),
        }
        launcher = [] if how == PLAIN else ["-m", "chatterbox_turbo.cli", "run", "--preset", how, "--"]
        with self.log.open("wb") as log, theirs:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, program.script],
                cwd=copy,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False)

    def wait(self) -> float:
        """Seconds until its model is loaded, from now; ``RuntimeError`` with its last words where it is not."""
        start = time.perf_counter()
        while time.perf_counter() - start < PATIENCE:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError, ValueError, KeyError):
                state = self.client.get(self.program.health).json()
                if self.program.ready(state):
                    return time.perf_counter() - start
                if state.get("initialization_state") == "error":
                    break
            time.sleep(0.2)
        words = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{self.program.name}, {self.how}: no model.\n{words}")

    def seed(self, number: int) -> None:
        self._seeds.sendall(b"%d\n" % number)
        if not self._seeds.recv(8):
            raise RuntimeError(f"{self.program.name}, {self.how}: ended.")

    def resident(self) -> float:
        """MB in memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def optimized(self) -> int:
        """How many models the launcher has optimized in it."""
        return len(self.report.read_text().splitlines()) if self.report.exists() else 0

    def stop(self) -> None:
        self.client.close()
        self._seeds.close()
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Answers:
    """Of one server and one kind of work: seconds, samples by number, failures in words."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.first: dict[int, float] = {}
        self.samples: dict[int, bytes] = {}
        self.failures: list[str] = []

    def take(self, client: httpx.Client, case: Any, number: int) -> None:
        try:
            self.samples[number], self.first[number], self.seconds[number] = ask(client, case, number)
        except (NoSpeech, httpx.HTTPError, soundfile.SoundFileError, ValueError, KeyError) as error:
            self.failures.append(f"{case.name}, {number}: {type(error).__name__}: {error}")

    def against(self, plain: Answers) -> dict[str, Any]:
        """Figures for the table and the file, with the unoptimised server's answers to the same."""
        both = sorted(self.seconds.keys() & plain.seconds.keys())
        same = [number for number in both if self.samples[number] == plain.samples[number]]
        return {
            "answered": len(self.seconds),
            "failures": self.failures,
            "median_s": statistics.median(self.seconds.values()) if self.seconds else None,
            "first_byte_median_s": statistics.median(self.first.values()) if self.first else None,
            "ratio": statistics.median(self.seconds[n] / plain.seconds[n] for n in both) if both else None,
            "same_samples": len(same),
            "compared": len(both),
        }


def every_case(servers: list[Running], without: list[str]) -> dict[str, Any]:
    """Each kind of request, twice of each server; the first of these is not counted."""
    found = {}
    for case in servers[0].program.cases:
        if case.name in without:
            continue
        answers = {server.how: Answers() for server in servers}
        for number, server in ((number, server) for number in (0, 1) for server in servers):
            server.seed(1 + number)
            answers[server.how].take(server.client, case, number)
        for each in answers.values():
            each.seconds.pop(0, None)
        found[case.name] = {how: each.against(answers[PLAIN]) for how, each in answers.items()}
        print(f"  {case.name}: {summary(found[case.name])}", file=sys.stderr, flush=True)
    return found


def in_a_row(servers: list[Running], count: int) -> dict[str, Any]:
    """So many requests, each asked of all servers in turn; resident memory after a quarter of them and at the end."""
    case, answers = servers[0].program.cases[0], {server.how: Answers() for server in servers}
    memory: dict[str, list[float]] = {server.how: [] for server in servers}
    for number in range(1, count + 1):
        turn = number % len(servers)
        for server in servers[turn:] + servers[:turn]:
            server.seed(1 + number)
            answers[server.how].take(server.client, case, number)
            if number in (max(1, count // 4), count):
                memory[server.how].append(server.resident())
    found = {how: each.against(answers[PLAIN]) | {"resident_mb": memory[how]} for how, each in answers.items()}
    print(f"  in a row: {summary(found)}", file=sys.stderr, flush=True)
    return found


def at_once(servers: list[Running], clients: int, each: int) -> dict[str, Any]:
    """So many clients with so many requests each, at one server after the other."""
    case, answers, wall = servers[0].program.cases[0], {}, {}
    for server in servers:
        found = answers[server.how] = Answers()

        def client(first: int, server: Running = server, found: Answers = found) -> None:
            with httpx.Client(base_url=server.client.base_url, timeout=PATIENCE, trust_env=False) as own:
                for number in range(first, first + each):
                    found.take(own, case, number)

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(1_000, 1_000 + clients * each, each)))
        wall[server.how] = time.perf_counter() - start
    table = {how: some.against(answers[PLAIN]) | {"wall_s": wall[how]} for how, some in answers.items()}
    if not servers[0].program.seeded:  # one generator for all clients
        table = {how: row | {"same_samples": None} for how, row in table.items()}
    print(f"  at once: {summary(table)}", file=sys.stderr, flush=True)
    return table


def reloaded(servers: list[Running], rounds: int) -> dict[str, Any] | None:
    """Unloaded, asked (which has to be refused), loaded again and asked, as often; what memory does meanwhile."""
    program = servers[0].program
    if program.unload is None or program.reload is None:
        return None
    answers = {server.how: Answers() for server in servers}
    memory: dict[str, list[float]] = {server.how: [server.resident()] for server in servers}
    for number, server in ((number, server) for number in range(rounds) for server in servers):
        found, case = answers[server.how], program.cases[0]
        server.client.post(program.unload).raise_for_status()
        with contextlib.suppress(NoSpeech):
            ask(server.client, case, number)
            found.failures.append("speech after unloading")
        server.client.post(program.reload).raise_for_status()
        found.take(server.client, case, number)
        memory[server.how].append(server.resident())
    found = {how: each.against(answers[PLAIN]) | {"resident_mb": memory[how]} for how, each in answers.items()}
    print(f"  reloaded: {summary(found)}", file=sys.stderr, flush=True)
    return found


def summary(found: dict[str, Any]) -> str:
    return "; ".join(
        f"{how} {row['answered']} answered, {len(row['failures'])} failed, "
        f"ratio {row['ratio'] or 0:.2f}, same {row['same_samples']}/{row['compared']}"
        for how, row in found.items()
    )


def measure(checkout: Path, options: argparse.Namespace, write: Any) -> None:
    """Fill ``write(key, value)`` for one checkout, in the order in which things are known."""
    program = program_in(checkout)
    print(program.name, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        repository = folder / "cache" / f"models--{program.repository.replace('/', '--')}"
        synthetic.save(repository / "snapshots" / "0123", program.family, options.size, options.stop_after)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")
        servers = []
        for how in (PLAIN, *options.presets):
            (folder / how).mkdir()
            servers.append(Running(program, checkout, folder / how, how, options))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait()
            for case in program.before:
                server.client.post(case.path, **case.arguments(0)).raise_for_status()
        write("family", program.family)
        if options.size == "tiny":
            write("cases", every_case(servers, options.without))
        write("row", in_a_row(servers, options.requests))
        write("at_once", at_once(servers, options.clients, options.each))
        write("reloaded", reloaded(servers, options.reloads))
        write("optimized", {server.how: server.optimized() for server in servers})


def markdown(found: dict[str, Any]) -> str:
    """Tables of a file that this script has written."""
    lines = []
    for name, server in found["servers"].items():
        lines += [f"**{name}** ({server['family']})", ""]
        lines += ["| | | answered | failed | median | ratio | same samples | memory, MB |", "|---|---|" + "---:|" * 6]
        parts = dict(server.get("cases", {}))
        parts[f"{found['options']['requests']} in a row"] = server.get("row")
        parts[f"{found['options']['clients']} x {found['options']['each']} at once"] = server.get("at_once")
        parts[f"unloaded and loaded, {found['options']['reloads']} times"] = server.get("reloaded")
        for part, rows in parts.items():
            for how, row in (rows or {}).items():
                median = "" if row["median_s"] is None else f"{row['median_s']:.3f} s"
                ratio = "" if how == PLAIN or row["ratio"] is None else f"{row['ratio']:.2f}"
                told = how != PLAIN and row["same_samples"] is not None
                same = f"{row['same_samples']} of {row['compared']}" if told else ""
                memory = " to ".join(f"{value:.0f}" for value in row.get("resident_mb") or [])
                cells = [part, how, row["answered"], len(row["failures"]), median, ratio, same, memory]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
                part = ""
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="+", type=lambda name: Path(name).absolute(), metavar="FOLDER")
    parser.add_argument("--requests", type=int, default=200, help="in a row")
    parser.add_argument("--clients", type=int, default=4, help="at once")
    parser.add_argument("--each", type=int, default=25, help="requests of each client")
    parser.add_argument("--reloads", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=["exact", "auto"])
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help="full: no request of each kind")
    parser.add_argument("--stop-after", type=int, help="speech tokens of a piece of text")
    parser.add_argument("--without", nargs="*", default=[], metavar="CASE", help="kinds of requests to leave out")
    parser.add_argument("--packages", nargs="*", default=[], type=lambda name: Path(name).absolute(), metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("servers.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the servers would stay
    packages = ("chatterbox-tts", "torch", "transformers", "numpy", "fastapi", "uvicorn")
    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "options": {
            name: getattr(options, name) for name in ("requests", "clients", "each", "reloads", "presets", "size")
        },
        "servers": {},
    }
    for checkout in options.checkouts:
        server = found["servers"][program_in(checkout).name] = {}

        def write(key: str, value: Any, server: dict[str, Any] = server) -> None:
            server[key] = value
            options.output.write_text(json.dumps(found, indent=1))  # after each part: a long run may be cut short

        measure(checkout, options, write)
    print(markdown(found))


if __name__ == "__main__":
    main()
