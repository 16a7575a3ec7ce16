"""TF32's process-wide switches, of either API that torch has for them: readable in a scope, and put back after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PREAMBLE = """
import torch
from chatterbox_turbo.runtime.device.tf32 import convolves_in_tf32, full_precision, tf32
backends = torch.backends

def older():
    return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

def newer():
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return ()
    owners = backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn
    return tuple(owner.fp32_precision for owner in owners)

def state():
    return older(), newer()
"""

# how a process may have set them before
SETTINGS = {
    "nothing": "",
    "matmul precision high": "torch.set_float32_matmul_precision('high')",
    "matmul precision medium": "torch.set_float32_matmul_precision('medium')",
    "matmul precision highest": "torch.set_float32_matmul_precision('highest')",
    "products": "backends.cuda.matmul.allow_tf32 = True",
    "no convolutions": "backends.cudnn.allow_tf32 = False",
}
NEWER = {
    "products": "backends.cuda.matmul.fp32_precision = 'tf32'",
    "no convolutions": "backends.cudnn.conv.fp32_precision = 'ieee'",
    "everything": "backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = 'tf32'",
    "nothing": "backends.fp32_precision = 'ieee'",
    "high, then not": "torch.set_float32_matmul_precision('high'); backends.cuda.matmul.fp32_precision = 'ieee'",
}


def run(program: str) -> str:
    """What a fresh process prints: the switches are its own."""
    done = subprocess.run([sys.executable, "-c", PREAMBLE + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_scopes_leave_every_switch_as_it_was_and_readable_meanwhile(setting):
    run(f"""
{setting}
before = state()
with tf32():
    precision, products, convolutions = older()
    assert precision in ("high", "medium") and products and convolutions, older()
    if newer():
        assert newer()[0] == newer()[2] == "tf32", newer()
assert state() == before, (before, state())
with full_precision():
    assert older() == ("highest", False, False), older()
    assert "tf32" not in newer() and "bf16" not in newer(), newer()
    with tf32():
        assert older()[1:] == (True, True)
    assert older() == ("highest", False, False)
assert state() == before, (before, state())
""")


@pytest.mark.parametrize("setting", NEWER.values(), ids=NEWER)
def test_what_the_newer_api_has_set_is_put_back_by_it(setting):
    import torch

    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision")
    run(f"""
def outcome(read):
    try:
        return read()
    except RuntimeError:
        return "mixed"

READERS = (
    torch.get_float32_matmul_precision, lambda: backends.cuda.matmul.allow_tf32, lambda: backends.cudnn.allow_tf32
)
{setting}
before = newer(), [outcome(read) for read in READERS]
with tf32():
    assert newer()[0] == newer()[2] == "tf32", newer()
assert (newer(), [outcome(read) for read in READERS]) == before
with full_precision():
    assert "tf32" not in newer(), newer()
assert (newer(), [outcome(read) for read in READERS]) == before
""")


def test_convolutions_are_not_in_tf32_where_the_older_switch_is_off():
    """On a GPU that could: what the report advises against its note."""
    run("""
torch.cuda.get_device_capability = lambda device: (9, 0)
gpu = torch.device("cuda", 0)
assert convolves_in_tf32(gpu)
backends.cudnn.allow_tf32 = False
assert not convolves_in_tf32(gpu)
backends.cudnn.allow_tf32 = True
assert convolves_in_tf32(gpu)
with full_precision():
    assert not convolves_in_tf32(gpu)
""")
