"""The chosen tests of one combination, and what came of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .environments import HERE, ROOT, SOURCE, TABLE, Combination, NotBuilt, build, read

Result = dict[str, Any]
LIMIT = 3600  # seconds that the tests of one combination may take
STATE = ("chatterbox_turbo/**/*.py", "tests/*.py", "pyproject.toml")


def state_of_the_code() -> str:
    """Changes with any line that the results depend on; the combination and the choice of tests are kept beside it."""
    files = sorted(path for pattern in STATE for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def expectation(combination: Combination) -> dict[str, Any]:
    """What a kept result must have been made of."""
    source = os.environ.get(SOURCE, "") if combination.chatterbox == "source" else ""
    return {"combination": asdict(combination), "tests": read()[2], "code": state_of_the_code(), "source": source}


def kept(combination: Combination, home: Path) -> Result | None:
    """The result of an earlier run of the same code, or None; one that could not be built is tried again."""
    file = home / f"{combination.folder}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    return result if result.get("made of") == expectation(combination) and not result["problem"] else None


def run(combination: Combination, home: Path, uv: str, keep: bool = False) -> Result:
    """Builds, asks, tests and writes ``<home>/<combination>.json``, which appears when all of it is done.

    The environment is left where something failed, or ``keep``.
    """
    began, folder = time.monotonic(), home / combination.folder
    made_of = expectation(combination)
    result: Result = {"name": combination.name, "made of": made_of, "problem": "", "versions": {}, "plans": {}}
    result |= {"passed": 0, "failed": {}, "skipped": {}}
    try:
        python = build(combination, folder, uv)
        result |= test(python, folder)
    except NotBuilt as error:
        result["problem"] = str(error)
    result["commit"] = commit(made_of["source"]) if made_of["source"] else ""
    result["seconds"] = round(time.monotonic() - began)
    file = home / f"{combination.folder}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(file)
    if not keep and not failed(result):
        shutil.rmtree(folder, ignore_errors=True)
    return result


def failed(result: Result) -> bool:
    return bool(result["problem"] or result["failed"])


def test(python: Path, folder: Path) -> dict[str, Any]:
    """Runs the chosen tests in one process beside pytest's own, so that one that dies is told by its name.

    Returns outcomes, and what plugin.py tells of the environment.
    """
    files = [str(Path("tests") / name) for name in read(TABLE)[2]]
    report, told = folder / "report.xml", folder / "told.json"
    options = ["-n", "1", "-m", "not gpu and not weights", "-p", "no:cacheprovider", "-p", "matrix.plugin"]
    options += ["--durations=15"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {
        "NUMBA_CACHE_DIR": str(folder / "kernels"),
        "PYTHONPATH": str(HERE.parent),
        "MATRIX_TOLD": str(told),
    }
    command = [str(python), "-m", "pytest", *options, f"--junitxml={report}", *files]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return {"failed": {"all": f"not done after {LIMIT} s"}}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not report.exists() or process.returncode not in (0, 1):
        return {"failed": {"pytest": (folder / "log.txt").read_text()[-800:]}}
    return outcomes(report) | (json.loads(told.read_text()) if told.exists() else {})


def outcomes(report: Path) -> dict[str, Any]:
    """``passed``, ``failed`` (message by test) and ``skipped`` (number of tests by reason) of a JUnit report."""
    passed, failures, skipped = 0, {}, Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [*case.iter("failure"), *case.iter("error")]
        skips = list(case.iter("skipped"))
        if wrong:
            failures[f"{case.get('classname')}::{case.get('name')}"] = (wrong[0].get("message") or "")[:400]
        elif skips:
            # a file that is skipped as a whole has its reason in a tuple below
            whole = re.search(r"Skipped: (.*?)['\"]\)?\s*$", skips[0].text or "", re.DOTALL)
            skipped[whole[1] if whole else skips[0].get("message") or "without a reason"] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": failures, "skipped": dict(skipped)}


def commit(source: str) -> str:
    """The short name of a checkout's commit; empty where it is none."""
    if not (Path(source) / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", source, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()
