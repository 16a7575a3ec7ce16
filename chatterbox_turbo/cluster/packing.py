"""Lines to batches for actors: of alike length, the longest first, ever smaller, so that all end at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ..speech.lines import Line
from ..text import estimate_tokens

T = TypeVar("T")
WAVES = 4  # lines of a batch for each slot: as one ends, the next takes its place
VOICE = 250  # tokens: what flow matching solves for the voice's 10 s with every line, however short that is


def batches(lines: Sequence[Line], actors: int, slots: int) -> list[list[Line]]:
    """Every line once.

    Args:
        slots: lines that an actor decodes at once.
    """
    sizes = [VOICE + estimate_tokens(line.item["text"], line.item.get("language_id")) for line in lines]
    return pack(lines, sizes, slots * WAVES, actors)


def pack(items: Sequence[T], sizes: Sequence[float], most: int, actors: int) -> list[list[T]]:
    """Items by size, the largest first, in batches of ``most`` at most, and of a share of what is left, or one item.

    The share is half of an actor's, and not below an eighth of one of the whole (guided self-scheduling,
    Polychronopoulos and Kuck 1987): nobody waits long for the last ones. docs/cluster_model.md compares it with others.
    """
    packed: list[list[T]] = []
    left = total = sum(sizes)
    filled = share = 0.0
    for number in sorted(range(len(items)), key=lambda number: -sizes[number]):
        if not packed or len(packed[-1]) == most or filled + sizes[number] > share:
            packed.append([])
            left -= filled
            filled, share = 0.0, max(left / (2 * actors), total / (8 * actors))
        packed[-1].append(items[number])
        filled += sizes[number]
    return packed
