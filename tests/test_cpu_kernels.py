"""The kernels for CPUs: products in every format and for every number of rows, rounding."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llvmlite.binding import get_host_cpu_features
from numba import njit

import chatterbox_turbo as turbo
from chatterbox_turbo.runtime.cpu import instructions
from chatterbox_turbo.runtime.cpu import products as kernels
from chatterbox_turbo.runtime.cpu.instructions import EXACT, FAST, multiplies_pairs, round_to_bf16, to_bf16
from chatterbox_turbo.runtime.cpu.threads import kernel_threads, why_no_kernels
from chatterbox_turbo.runtime.cpu.tiles import multiplies_tiles
from chatterbox_turbo.runtime.quantization import backend_on


@pytest.fixture(autouse=True)
def _threads():
    """A kernel that is called on its own leaves torch with another number of threads, and so with other last bits."""
    with kernel_threads():
        yield


NO_BIAS = np.empty(0, np.float32)
needs_pairs = pytest.mark.skipif(
    not multiplies_pairs(), reason="this processor has no AVX-512 BF16, or numba compiles for another one"
)
needs_tiles = pytest.mark.skipif(not multiplies_tiles(), reason="this processor or system has no AMX for bf16")


def array(x):
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


formats_of_both = pytest.mark.parametrize(
    "formats",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        pytest.param((torch.bfloat16, torch.bfloat16), marks=needs_pairs),
    ],
    ids=["fp32", "bf16 weights", "bf16"],
)


@formats_of_both
@pytest.mark.parametrize(("outputs", "inner"), [(50, 256), (129, 768), (7, 512), (1, 256), (27, 2304), (16, 4096)])
def test_products_of_any_number_of_rows(formats, outputs, inner):
    """Against fp64 on the same rounded numbers; and a row is the same whatever is beside it."""
    generator = torch.Generator().manual_seed(outputs)
    w = torch.randn(outputs, inner, generator=generator).to(formats[0])
    x = torch.randn(19, inner, generator=generator).to(formats[1])
    bias = torch.randn(outputs, generator=generator)
    right = x.double() @ w.double().T
    alone = np.empty((19, outputs), np.float32)
    for row in range(19):
        kernels.project(array(w), NO_BIAS, array(x[row : row + 1]), alone[row : row + 1], 2)
    assert (torch.from_numpy(alone) - right).abs().max() < 1e-5 * right.abs().max()
    for rows in range(1, 20):
        y = np.full((rows, outputs), np.nan, np.float32)
        kernels.project(array(w), NO_BIAS, array(x[:rows]), y, 2)
        assert np.array_equal(y, alone[:rows]), rows
    kernels.project(array(w), bias.numpy(), array(x), y, 2)
    assert np.array_equal(y, alone + bias.numpy())


@formats_of_both
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_products_with_their_activation(formats, rows):
    """SiLU(gate) * up and GELU in its tanh approximation, against fp64 on the same rounded numbers."""
    generator = torch.Generator().manual_seed(rows)
    w = (torch.randn(96, 256, generator=generator) / 8).to(formats[0])
    x = torch.randn(rows, 256, generator=generator).to(formats[1])
    bias = torch.randn(96, generator=generator)
    plain = x.double() @ w.double().T
    y = np.empty((rows, 96), np.float32)
    kernels.project_gated(array(w), array(x), y, 2)
    gated = F.silu(plain[:, :48]) * plain[:, 48:]
    assert (torch.from_numpy(y[:, :48]) - gated).abs().max() < 1e-5 * gated.abs().max()
    kernels.project_gelu(array(w), bias.numpy(), array(x), y, 2)
    gelu = F.gelu(plain + bias.double(), approximate="tanh")
    assert (torch.from_numpy(y) - gelu).abs().max() < 1e-5 * gelu.abs().max()


def test_rounding_is_that_of_torch():
    bits = torch.cat(
        [
            torch.randint(-(2**31), 2**31 - 1, (99_000,), generator=torch.Generator().manual_seed(0)),
            torch.arange(-500, 500) * 0x8000,  # ties, odd and even
            torch.tensor([0, -(2**31), 0x7F800000, -0x800000, 0x7F7FFFFF, 0x7FFFFFFF, -1, 0x7FC00000]),
        ]
    ).to(torch.int32)
    x, right = bits.view(torch.float32)[None], bits.view(torch.float32)[None].bfloat16()

    @njit(fastmath=FAST)
    def in_fast_arithmetic(x, rounded):  # numba hands it down to what it compiles for a caller
        for k in range(x.shape[1]):
            rounded[0, k] = fresh(x[0, k])

    fresh = njit(to_bf16.py_func)
    for rounding in (in_fast_arithmetic, round_to_bf16):
        rounded = np.empty(x.shape, np.int16)
        rounding(x.numpy(), rounded)
        ours = torch.from_numpy(rounded)
        assert torch.equal(ours.view(torch.bfloat16).isnan(), right.isnan()) and right.isnan().any()
        assert torch.equal(ours[~right.isnan()], right[~right.isnan()].view(torch.int16))


@pytest.mark.parametrize(("option", "value"), [("CPU_NAME", "generic"), ("CPU_FEATURES", "+sse2"), ("ENABLE_AVX", 0)])
def test_a_processor_that_is_asked_for_is_not_taken_for_this_one(option, value, monkeypatch):
    monkeypatch.setattr(instructions.config, option, value)
    assert not any(map(instructions.has, get_host_cpu_features())) and not instructions.is_zen()


def test_a_kernel_that_cannot_be_saved_runs_all_the_same():
    resource = pytest.importorskip("resource")

    @instructions.jit()
    def doubled(x):
        return x + x

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))  # what is written past it fails, as on a full disk
    try:
        assert doubled(21) == 42
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        instructions.KERNELS.remove(doubled)
    assert njit(cache=True)(doubled.py_func)(2) == 4, "what was left on disk is read by the next process"


OLDER = """
from chatterbox_turbo.runtime.cpu import instructions, products
import numpy as np
instructions.round_to_bf16(np.ones((1, 16), np.float32), np.empty((1, 16), np.int16))
print(*instructions.compilations())
"""


def test_a_kernel_is_compiled_anew_once_the_file_of_another_has_changed(tmp_path):
    # it may have that other one inside, which numba does not look at
    copy = tmp_path / "chatterbox_turbo"
    shutil.copytree(Path(turbo.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}

    def compilations() -> list[int]:
        command = [sys.executable, "-c", OLDER]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return [int(count) for count in result.stdout.split()]

    (first, found), (again, kept) = compilations(), compilations()
    assert first > 0 and kept > 0 and found == again == 0
    with (copy / "runtime" / "cpu" / "products.py").open("a") as file:
        file.write("# changed\n")
    assert compilations() == [first, 0]


@pytest.mark.skipif(not instructions.has("avx2"), reason="it is about this processor's instructions")
@pytest.mark.parametrize("name", ["project_gated", "project_gelu"])
def test_activations_are_computed_by_vector_instructions(name):
    rows, width = 2, kernels.GRANULE
    # numba does not show the code of what it has found on disk
    kernel = njit(parallel=True, fastmath=EXACT)(getattr(kernels, name).py_func)
    x, bias = np.ones((rows, width), np.float32), np.zeros(width, np.float32)
    if name == "project_gelu":
        kernel(np.ones((width, width), np.float32), bias, x, np.empty((rows, width), np.float32), 1)
    else:
        kernel(np.ones((2 * width, width), np.float32), x, np.empty((rows, 2 * width), np.float32), 1)
    code = "".join(kernel.inspect_asm().values())
    assert re.search(r"vdivps\s.*%[yz]mm", code), "one number at a time: an eighth of the speed"


def test_numbers_of_threads_are_the_callers_afterwards():
    if numba.config.NUMBA_NUM_THREADS < 2 or torch.get_num_threads() > 1:
        pytest.skip("needs two threads of numba's and one of torch's")
    numba.set_num_threads(2)
    with kernel_threads() as threads:
        assert numba.get_num_threads() == threads == 1
    assert (numba.get_num_threads(), torch.get_num_threads()) == (2, 1)


def test_why_there_are_no_kernels(monkeypatch, tmp_path):
    assert why_no_kernels() == ""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert why_no_kernels() == "NUMBA_DISABLE_JIT is set"
    assert "NUMBA_DISABLE_JIT is set" in backend_on("int8", torch.device("cpu")).remark
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.1 or less')")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numba.py").write_text("raise OSError('Could not find/load shared object file')")
    for folder, reason in ((tmp_path, "NumPy 2.1 or less"), (tmp_path / "broken", "shared object file")):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            patch.delitem(sys.modules, "numba")
            assert why_no_kernels().startswith("numba cannot be imported") and reason in why_no_kernels()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        assert why_no_kernels().startswith("numba is not installed")
