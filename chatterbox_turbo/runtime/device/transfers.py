"""What has been moved between devices: how often, how much, how long it took."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from .. import forks

KINDS = 64  # names that are told apart; what comes under another one is counted as OTHER
OTHER = "other"


@dataclass
class Moved:
    """The transfers of one name: their number, their bytes, and the seconds that somebody waited for them."""

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, size: int, seconds: float) -> None:
        """Count one more."""
        self.count, self.bytes, self.seconds = self.count + 1, self.bytes + size, self.seconds + seconds

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"count": self.count, "bytes": self.bytes, "seconds": self.seconds}


class Transfers:
    """A record of transfers by name, from any thread. Keeps sums, not the single transfers."""

    def __init__(self) -> None:
        self._moved: OrderedDict[str, Moved] = OrderedDict()
        self._lock = forks.lock()  # held for an addition only

    def record(self, what: str, bytes: int, seconds: float) -> None:
        """Note one transfer.

        Args:
            what: a name for the report, such as ``"s3gen.tokenizer to cpu"``; few of them.
            bytes: that were moved.
            seconds: that the caller waited for it; for a copy on a side stream what is known of its duration.
        """
        with self._lock:
            known = what in self._moved or len(self._moved) < KINDS
            self._moved.setdefault(what if known else OTHER, Moved()).add(int(bytes), float(seconds))

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._moved.clear()

    def to_dict(self) -> dict[str, Any]:
        """``count``, ``bytes`` and ``seconds`` of all, and ``by``: the same by name, in the order of the first ones."""
        with self._lock:
            by = {what: moved.to_dict() for what, moved in self._moved.items()}
        total = {key: sum(one[key] for one in by.values()) for key in ("count", "bytes", "seconds")}
        return {**total, "by": by}
