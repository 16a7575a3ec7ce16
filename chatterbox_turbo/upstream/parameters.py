"""Other storage under upstream's own parameters: groups fused into one tensor, other number formats; both undone.

The parameters stay the objects that upstream made, so that everything which holds one of them goes on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..patching import Journal
from ..runtime.device import half_precision
from ..runtime.memory.clearing import replaced
from .prepared import version

Group = Sequence[nn.Parameter]


@dataclass
class _Change:
    """One parameter that was cast.

    Attributes:
        original: its format before.
        version: how often its values had been written in place by then.
        remainder: what gives its values back; ``None`` once it was let go.
        companion: a parameter beside it that keeps its format, and so shows whether somebody has cast the whole part.
    """

    parameter: nn.Parameter
    original: torch.dtype
    version: int | None
    remainder: half_precision.Remainder | None
    companion: nn.Parameter
    companion_was: torch.dtype


class Cast:
    """Other number formats of some parameters, taken back in one go, or not at all where memory runs out.

    Taking back restores each parameter to the bit, unless ``forget`` was called: then the rounded values get the
    original format. Where the app has cast or moved the part meanwhile, it has the app's format and place afterwards,
    as if this cast had never been. Values that were written since (``load_state_dict``) stay as they are, rounded.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._changes: list[_Change] = []

    @property
    def nbytes(self) -> int:
        """Bytes on the host from which the original values are restored."""
        return sum(change.remainder.nbytes for change in self._changes if change.remainder is not None)

    def add(self, parameter: nn.Parameter, companion: nn.Parameter) -> None:
        """Cast one more; nothing happens to a parameter that has the format."""
        if parameter.dtype == self._dtype:
            return
        with torch.no_grad():
            half, remainder = half_precision.cast(parameter.data, self._dtype)
        self._changes.append(
            _Change(parameter, parameter.dtype, version(parameter), remainder, companion, companion.dtype)
        )
        parameter.data = half
        del half
        replaced(len(self._changes) - 1)

    def forget(self) -> None:
        """Let the memory go from which the original values are restored."""
        for change in self._changes:
            change.remainder = None
        replaced()

    def undo(self) -> None:
        """Take it back; where that fails for one parameter, none of them is."""
        done = 0
        try:
            for change in self._changes:
                with torch.no_grad():
                    change.parameter.data = self._before(change)
                done += 1
                replaced(done)
        except BaseException:
            self._redo(self._changes[:done])
            raise
        replaced()

    def redo(self) -> None:
        """Cast again what was taken back."""
        self._redo(self._changes)

    def _redo(self, changes: Sequence[_Change]) -> None:
        for number, change in enumerate(changes):
            with torch.no_grad():
                change.parameter.data = half_precision.cast(change.parameter.data, self._dtype)[0]
            replaced(number)

    def _before(self, change: _Change) -> Tensor:
        data = change.parameter.data
        half = data.to(self._dtype)
        # cast once more since, into a format that holds every number of this one
        wider = data.dtype in (torch.float32, torch.float64) and torch.equal(half.to(data.dtype), data)
        same = data.dtype == self._dtype or wider
        if same and change.remainder is not None and version(change.parameter) == change.version:
            data = change.remainder(half)
        now = change.companion.dtype
        cast_since = now != change.companion_was and now.is_floating_point
        return data.to(now if cast_since else change.original)


def made_in_inference_mode(model: Any) -> bool:
    """Whether the model's acoustic half is of inference tensors, as one that is loaded inside inference mode."""
    s3gen = getattr(model, "s3gen", None)
    return isinstance(s3gen, nn.Module) and any(version(parameter) is None for parameter in s3gen.parameters())


def cast(
    groups: Iterable[tuple[nn.Parameter, Iterable[nn.Parameter]]],
    dtype: torch.dtype,
    journal: Journal,
    description: str,
) -> Cast:
    """Change the format of every parameter; undoing restores each to the bit (``Cast``).

    Args:
        groups: parameters, each with its companion: one of the same module that keeps its format.
    """
    made = Cast(dtype)
    journal.record(description, made.undo, made.redo)
    for companion, parameters in groups:
        for parameter in parameters:
            made.add(parameter, companion)
    replaced()
    return made


def fuse(groups: Callable[[], Sequence[Group]], journal: Journal, description: str, transposed: bool = False) -> None:
    """Give every group one storage (``fuse_group``); undoing gives each parameter its own, contiguous.

    ``groups`` is asked again by then: others may have been assigned meanwhile, and fused when they were read.
    """
    for number, group in enumerate(groups()):

        def undo(number=number, group=group) -> None:
            _separate(group)
            with suppress(AttributeError, IndexError):  # another architecture has been put there
                _separate(groups()[number])
            replaced(number)

        journal.record(description, undo)
        fuse_group(group, transposed)
        replaced(number)
    replaced()


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
