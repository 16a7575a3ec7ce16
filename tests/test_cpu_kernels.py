"""Products and rounding of the kernels of one decode step, in every format and for every number of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chatterbox_turbo.runtime import cpu_products as kernels
from chatterbox_turbo.runtime.cpu_instructions import multiplies_pairs, round_to_bf16

NO_BIAS = np.empty(0, np.float32)
needs_pairs = pytest.mark.skipif(
    not multiplies_pairs(), reason="this processor has no AVX-512 BF16, or numba compiles for another one"
)


def array(x):
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


@pytest.mark.parametrize(
    "formats",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        pytest.param((torch.bfloat16, torch.bfloat16), marks=needs_pairs),
    ],
    ids=["fp32", "bf16 weights", "bf16"],
)
@pytest.mark.parametrize(("outputs", "inner"), [(50, 64), (129, 192), (7, 128), (1, 64)])
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


def test_rounding_is_that_of_torch():
    bits = torch.cat(
        [
            torch.randint(-(2**31), 2**31 - 1, (99_000,), generator=torch.Generator().manual_seed(0)),
            torch.arange(-500, 500) * 0x8000,  # ties, odd and even
            torch.tensor([0, -(2**31), 0x7F800000, -0x800000, 0x7F7FFFFF, 0x7FFFFFFF, -1, 0x7FC00000]),
        ]
    ).to(torch.int32)
    x = bits.view(torch.float32)[None]
    rounded = np.empty(x.shape, np.int16)
    round_to_bf16(x.numpy(), rounded)
    ours, right = torch.from_numpy(rounded), x.bfloat16()
    assert torch.equal(ours.view(torch.bfloat16).isnan(), right.isnan()) and right.isnan().any()
    assert torch.equal(ours[~right.isnan()], right[~right.isnan()].view(torch.int16))


def test_a_processor_that_is_asked_for_is_not_taken_for_this_one(monkeypatch):
    monkeypatch.setattr("chatterbox_turbo.runtime.cpu_instructions.config.CPU_NAME", "generic")
    assert not multiplies_pairs()
