"""``make matrix``: every combination in turn, and docs/versions.md when all of them have a result.

PYTHONPATH=tests python -m matrix [--only TEXT] [--again] [--keep] [--home FOLDER] [--list]

What an interrupted run has finished is not run again as long as the code is the same. Interpreters (``python3.10`` and
so on) come from the folders of PYTHONS, then from PATH; CHATTERBOX_SOURCE is a checkout of chatterbox's development
branch; UV is uv, if it is neither on PATH nor beside this Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from .environments import ROOT, Combination, read
from .runs import Result, failed, kept, run
from .table import page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="combinations with this text in their name")
    parser.add_argument("--again", action="store_true", help="run also what has a result")
    parser.add_argument("--keep", action="store_true", help="leave environments that passed")
    parser.add_argument("--home", type=Path, default=ROOT / ".matrix", help="folder of environments and results")
    parser.add_argument("--list", action="store_true", help="name the combinations and what is known of them")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the tests in progress end too
    uv = os.environ.get("UV") or shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    combinations, refused, _ = read()
    home = wanted.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    results: list[Result | None] = []
    for number, combination in enumerate(combinations, 1):
        result = kept(combination, home)
        mine = wanted.only in combination.name and not wanted.list
        if mine and (result is None or wanted.again):
            print(f"{number}/{len(combinations)} {title(combination)}", flush=True)
            result = run(combination, home, uv, wanted.keep)
        results.append(result)
        if wanted.only in combination.name:
            print(f"{number}/{len(combinations)} {combination.name}: {summary(result)}", flush=True)
    done = [result for result in results if result]
    if len(done) == len(combinations):
        (ROOT / "docs" / "versions.md").write_text(page(done, refused))
        (home / "versions.json").write_text(json.dumps(done, indent=1))
        print(f"Written: docs/versions.md, {home / 'versions.json'}")
    else:
        print(f"{len(combinations) - len(done)} without a result: docs/versions.md is as it was.")
    return int(any(failed(result) for result in done))


def title(combination: Combination) -> str:
    asked = f"chatterbox-tts {combination.chatterbox}, transformers {combination.transformers}"
    return f"{combination.name}: {asked}, torch {combination.torch}, Python {combination.python}"


def summary(result: Result | None) -> str:
    if result is None:
        return "no result of this code"
    if result["problem"]:
        return f"not run: {result['problem']}"
    counts = f"{result['passed']} passed, {sum(result['skipped'].values())} skipped, {len(result['failed'])} failed"
    return f"{counts}, {result['seconds']} s" + "".join(
        f"\n    {name}: {why[:160]}" for name, why in result["failed"].items()
    )


if __name__ == "__main__":
    sys.exit(main())
