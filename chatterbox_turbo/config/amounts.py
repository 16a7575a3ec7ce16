"""Amounts of memory as users write them: ``"2GB"``, ``"1536 MiB"``, ``"50%"``, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import brief

UNITS = {"": 1, **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}}
UNITS |= {"b": 1, **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}}
MOST = 2**63  # bytes; above that no device is, and numbers of files may not even be a float
FORMS = 'write "2GB", "1536MiB", "50%" or a number of bytes'


@dataclass(frozen=True)
class Amount:
    """So many bytes, or a share of all that a device has, between 0 and 1; one of the two is ``None``."""

    size: int | None = None
    share: float | None = None

    def of(self, total: int) -> int:
        """Bytes, where the device has ``total``."""
        return int(total * self.share) if self.size is None else self.size


def parse(value: Any) -> Amount:
    """What a user wrote.

    Raises:
        ValueError: it is no amount, not above zero, or a share above 100 %.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        number, unit = float(max(-1, min(value, MOST))), ""
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)\s*([a-zA-Z]*|%)\s*", value)
        if match is None:
            raise ValueError(f"{brief(value)} is no amount of memory: {FORMS}")
        number, unit = float(match[1]), match[2].lower()
    else:
        raise ValueError(f"{brief(value)} is no amount of memory: {FORMS}")
    if number <= 0:
        raise ValueError(f"{brief(value)} is not above zero: {FORMS}")
    if unit == "%":
        if number > 100:
            raise ValueError(f"{brief(value)} is more than there is: a share is at most 100%")
        return Amount(share=number / 100)
    if unit not in UNITS:
        raise ValueError(
            f"{brief(value)} has an unknown unit: kB, MB, GB and TB are powers of 1000, MiB and GiB of 1024"
        )
    if number * UNITS[unit] >= MOST:
        raise ValueError(f"{brief(value)} is more than any device has: {FORMS}")
    size = int(number * UNITS[unit])
    if size < 2**20:
        raise ValueError(f"{brief(value)} is {size} bytes, less than any model needs: {FORMS}")
    return Amount(size=size)


def gigabytes(size: float) -> str:
    """Bytes as text with three digits: ``1.23 GB``, ``456 MB``, ``7.8 MB``."""
    if size >= 0.9995e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 9.95e6 else f"{size / 1e6:.1f} MB"
