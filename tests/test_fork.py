"""Children of ``fork`` compute what their parent computes, and none is killed or waits for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from chatterbox_turbo.passes.base import Switch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
TWO_THREADS = {  # or nothing would be parallel; and they sleep while they wait, since children run at the same time
    "OMP_NUM_THREADS": "2",
    "NUMBA_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
}
TIMEOUT = 600  # seconds for all children one after the other, where kernels have to be compiled first


def run(*arguments: str, **environment: str) -> str:
    """The last line that a fresh process prints which has two threads to compute with; no child of it stays."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **TWO_THREADS, **environment},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    return output.splitlines()[-1]


@pytest.fixture(scope="module")
def outcomes():
    return json.loads(run(str(Path(__file__).with_name("forked.py"))))


@pytest.mark.parametrize(
    ("way", "expected"),
    {
        "after apply": "right",
        "after generate": "right",
        "of a child": ["right", ["right", "right"]],
        "from a thread": ["right", "right"],
        "several": ["right", "right", "right"],
        "multiprocessing": "right",
        "in half precision": "right",
        "batch": "right",
        "applies and reverts": ["right", "right"],
        "amid a batch of another thread": ["right", "right"],
        "amid a call of its own": ["right", ["right", "right"]],
    }.items(),
)
def test_a_forked_child_speaks_as_its_parent(outcomes, way, expected):
    assert outcomes["parent"] == "right"
    assert outcomes[way] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP elsewhere starts its threads anew")
def test_only_the_thread_that_forked_computes_alone_and_the_report_says_so(outcomes):
    assert outcomes["in a thread of the child"] == [1, "right", [2, "right"]]
    parent, child = outcomes["report"]
    assert "forked" not in parent
    assert "1 thread to compute with" in child and "another thread of this process to use all 2" in child


KERNELS = """
import os, threading, time, numba, numpy as np
from numba.core.compiler_lock import global_compiler_lock
from chatterbox_turbo.runtime import forks
from chatterbox_turbo.runtime.cpu.products import project
from chatterbox_turbo.runtime.cpu.threads import kernel_threads

def compute(thread=False):
    w, x, y = np.ones((64, 256), np.float32), np.ones((2, 256), np.float32), np.empty((2, 64), np.float32)
    with kernel_threads() as threads:
        project(w, np.empty(0, np.float32), x, y, threads)
    if not thread:
        other = threading.Thread(target=compute, args=(True,))
        other.start()
        other.join()
    assert (y == 256).all()

@numba.njit(parallel=True)
def of_others(x):
    for i in numba.prange(x.size):
        x[i] += 1

@numba.njit
def compiled_in_the_child(x):
    return x + 1

def compile_something():
    with global_compiler_lock:
        compiling.set()
        time.sleep(1.5)
        compiled.set()

def threads():
    return set(os.listdir(TASKS)) if os.path.exists(TASKS) else set()

TASKS, known, started = "/proc/self/task", set(), []
os.register_at_fork(before=lambda: started.append(threads() - known))  # the first to be registered is called last
forks.prepare()
compute()
of_others(np.zeros(100))
compiling, compiled = threading.Event(), threading.Event()
threading.Thread(target=compile_something).start()
compiling.wait()
child = os.fork()
assert compiled.is_set()  # more than a second later, which is all that it waits for threads to end
of_others(np.zeros(100))
compute()
if not child:
    known = threads()
    compute()
    grandchild = os.fork()
    assert not started[-1]  # the threads of that call have ended, for they may hold a lock that compiling takes
    compute()
    assert compiled_in_the_child(1) == 2
    os._exit(0 if not grandchild or os.waitpid(grandchild, 0)[1] == 0 else 1)
print(numba.threading_layer(), os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_kernels_survive_a_fork_whatever_numba_runs_them_by(layer):
    assert run("-c", KERNELS, NUMBA_THREADING_LAYER=layer) == f"{layer} 0"


def test_calls_are_diverted_for_the_thread_that_asked_alone():
    """A thread that is gone after a fork cannot put them back."""
    switch, inside, leave = Switch(lambda: "function"), threading.Event(), threading.Event()

    def divert():
        with switch.diverted(lambda: "handler"):
            assert switch() == "handler"
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=divert)
    thread.start()
    assert inside.wait(10)
    assert switch() == "function"
    leave.set()
    thread.join()
