"""Lines to batches for actors: of alike length, the longest first, many enough to keep every actor busy to the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ..speech.lines import Line
from ..text import estimate_tokens

T = TypeVar("T")
WAVES = 4  # lines of a batch for each slot: as one ends, the next takes its place
ROUNDS = 4  # batches for each actor at least, or the last ones would be waited for


def batches(lines: Sequence[Line], actors: int, slots: int) -> list[list[Line]]:
    """Every line once.

    Args:
        slots: lines that an actor decodes at once.
    """
    sizes = [1.0 + estimate_tokens(line.item["text"], line.item.get("language_id")) for line in lines]
    return pack(lines, sizes, slots * WAVES, sum(sizes) / (actors * ROUNDS))


def pack(items: Sequence[T], sizes: Sequence[float], most: int, total: float) -> list[list[T]]:
    """Items by size, the largest first, in batches of ``most`` items, and of ``total`` or one item, at most."""
    packed: list[list[T]] = []
    filled = 0.0
    for number in sorted(range(len(items)), key=lambda number: -sizes[number]):
        if not packed or len(packed[-1]) == most or filled + sizes[number] > total:
            packed.append([])
            filled = 0.0
        packed[-1].append(items[number])
        filled += sizes[number]
    return packed
