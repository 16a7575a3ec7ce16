"""From numbers to codes, scales and zeros: rounding to the nearest, and scales fitted to what rounding made."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .quantized import SCHEMES, QuantizedMatrix, Scheme, pack

ROWS = 1024  # outputs that are rounded at once: bounds what is held in fp32 beside the matrix
FITS = 8  # alternations of codes and scales; the error hardly falls after five


@torch.no_grad()
def quantize(weight: Tensor, scheme: str, fit: bool = True) -> QuantizedMatrix:
    """A matrix (out, in) of any floating-point format in a scheme's.

    Args:
        fit: of int4, choose scale and zero of each group by least squares on its codes, and the codes for these, in
            turns (Lloyd, 1982, for a uniform grid); else they span the group from its least to its largest weight.

    Raises:
        ValueError: the number of inputs is no multiple of what the scheme packs together.
    """
    form = SCHEMES[scheme]
    if weight.size(1) % form.multiple:
        raise ValueError(f"{weight.size(1)} inputs are no multiple of {form.multiple}, which {scheme} needs")
    parts = [_rounded(rows.float(), form, fit) for rows in weight.detach().split(ROWS)]
    codes, scales, zeros = (None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True))
    return QuantizedMatrix(scheme, codes, scales, zeros)


@cache
def forms(scheme: str, columns: int) -> tuple[tuple[torch.dtype, int], ...]:
    """Formats of the codes, scales and zeros (as far as there are any) of a matrix, and how many are in a row."""
    row = quantize(torch.empty(1, columns, device="meta"), scheme, fit=False)
    return tuple((tensor.dtype, tensor.size(1)) for tensor in row.tensors)


def _rounded(weight: Tensor, scheme: Scheme, fit: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    groups = weight.unflatten(1, (-1, scheme.group))
    if scheme.table is not None:
        codes, scales, zeros = *_by_table(groups, scheme.table().to(weight.device)), None
    elif scheme.bits == 8:
        codes, scales, zeros = *_symmetric(groups), None
    else:
        codes, scales, zeros = _asymmetric(groups, 2**scheme.bits - 1, FITS if fit else 0)
    return pack(codes.flatten(1), scheme), scales, zeros


def _symmetric(groups: Tensor) -> tuple[Tensor, Tensor]:
    largest = groups.abs().amax(-1)
    # bf16 rounds by one part in 256 at most: never so small that the largest weight would not fit
    scales = (largest * (1 + 2**-8) / 127).bfloat16()
    return (groups * _inverse(scales)[..., None]).round_(), scales


def _asymmetric(groups: Tensor, largest: int, fits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    scales = ((high - low) * (1 + 2**-8) / largest).bfloat16()
    zeros = (-low * _inverse(scales)).bfloat16()
    codes = _codes(groups, scales, zeros, largest)
    error = _error(groups, codes, scales, zeros)
    for _ in range(fits):
        scales_now, zeros_now = _least_squares(groups, codes, largest)
        codes_now = _codes(groups, scales_now, zeros_now, largest)
        error_now = _error(groups, codes_now, scales_now, zeros_now)
        better = error_now < error
        if not better.any():
            break
        scales, zeros = torch.where(better, scales_now, scales), torch.where(better, zeros_now, zeros)
        codes = torch.where(better[..., None], codes_now, codes)
        error = torch.where(better, error_now, error)
    return codes, scales, zeros


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, largest: int) -> Tensor:
    return (groups * _inverse(scales)[..., None] + zeros.float()[..., None]).round_().clamp_(0, largest)


def _error(groups: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return ((codes - zeros.float()[..., None]) * scales.float()[..., None] - groups).square_().sum(-1)


def _least_squares(groups: Tensor, codes: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """The line through (code, weight) pairs of each group; what a group of equal codes has none of stays 0."""
    middle, mean = codes.mean(-1), groups.mean(-1)
    spread = codes - middle[..., None]
    scales = ((spread * groups).sum(-1) / spread.square().sum(-1).clamp(min=1e-12)).bfloat16()
    zeros = (middle - mean * _inverse(scales)).clamp(0, largest).bfloat16()
    return scales, zeros


def _by_table(groups: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    scales = groups.abs().amax(-1)
    values, order = table.sort()
    middles = (values[1:] + values[:-1]) / 2
    nearest = torch.bucketize(groups * _inverse(scales)[..., None], middles)
    return order[nearest], scales


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale in fp32; 0 for a group of zeros."""
    scales = scales.float()
    return torch.where(scales > 0, 1 / scales.clamp(min=1e-38), 0.0)
