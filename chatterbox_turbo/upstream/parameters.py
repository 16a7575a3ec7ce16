"""Other storage under upstream's own parameters: groups fused into one tensor, other number formats; both undone.

The parameters stay the objects that upstream made, so that everything which holds one of them goes on working.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..patching import Journal
from ..runtime.cpu.host_memory import EVERY, give_back
from ..runtime.device import half_precision

Group = Sequence[nn.Parameter]


def cast(parameters: Sequence[nn.Parameter], dtype: torch.dtype, journal: Journal, description: str) -> None:
    """Change the format of every parameter; undoing restores each to the bit."""
    for number, parameter in enumerate(parameters):
        original = parameter.dtype
        with torch.no_grad():
            half, restore = half_precision.cast(parameter.data, dtype)

        def undo(number=number, parameter=parameter, restore=restore, original=original) -> None:
            with torch.no_grad():
                if parameter.dtype == dtype:
                    parameter.data = restore(parameter.data)
                elif parameter.dtype != original:  # somebody else has cast it meanwhile
                    parameter.data = parameter.data.to(original)
            _give_back_sometimes(number)

        journal.record(description, undo)
        parameter.data = half
        del half
        _give_back_sometimes(number)
    give_back()


def fuse(groups: Callable[[], Sequence[Group]], journal: Journal, description: str, transposed: bool = False) -> None:
    """Give every group one storage (``fuse_group``); undoing gives each parameter its own, contiguous.

    ``groups`` is asked again by then: others may have been assigned meanwhile, and fused when they were read.
    """
    for number, group in enumerate(groups()):

        def undo(number=number, group=group) -> None:
            _separate(group)
            with suppress(AttributeError, IndexError):  # another architecture has been put there
                _separate(groups()[number])
            _give_back_sometimes(number)

        journal.record(description, undo)
        fuse_group(group, transposed)
        _give_back_sometimes(number)
    give_back()


def fuse_group(group: Group, transposed: bool = False) -> None:
    """Lay the rows of a group's matrices one below the other; or a single (in, out) matrix as a view of (out, in)."""
    with torch.no_grad():
        if transposed:
            (parameter,) = group
            parameter.data = parameter.data.t().contiguous().t()
            return
        rows = torch.cat([parameter.data for parameter in group])
        for parameter, part in zip(group, rows.split([p.size(0) for p in group]), strict=True):
            parameter.data = part


def _separate(group: Group) -> None:
    for parameter in group:
        if parameter.data.untyped_storage().nbytes() != parameter.numel() * parameter.element_size() or (
            not parameter.is_contiguous()
        ):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def whole(group: Group, transposed: bool = False) -> Tensor | None:
    """The tensor (out, in) that a group's parameters are the rows of, or ``None`` where they are apart."""
    if transposed:
        return group[0].data.t() if group[0].data.t().is_contiguous() else None
    first, at = group[0].data, group[0].data_ptr()
    for parameter in group:
        if not parameter.is_contiguous() or parameter.data_ptr() != at:
            return None
        at += parameter.numel() * parameter.element_size()
    if first.untyped_storage().nbytes() - first.storage_offset() * first.element_size() < at - first.data_ptr():
        return None  # neighbours by chance
    rows = sum(parameter.size(0) for parameter in group)
    return first.as_strided((rows, first.size(1)), (first.size(1), 1))


def fused(group: Group, transposed: bool = False) -> Tensor:
    """``whole``, after fusing what somebody took apart (``.to()``, ``.bfloat16()``)."""
    rows = whole(group, transposed)
    if rows is None:
        fuse_group(group, transposed)
        rows = whole(group, transposed)
    return rows


def _give_back_sometimes(number: int) -> None:
    if number % EVERY == 0:  # and so at the last undo, which is that of number 0
        give_back()
