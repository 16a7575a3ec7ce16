"""What a model, its passes and its process have in memory, as data."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..passes.base import Engines
from ..runtime.cpu import process_memory
from ..runtime.device.transfers import Transfers
from ..runtime.memory import clearing, readings
from ..runtime.memory.clearing import Tally
from ..runtime.memory.holdings import measure, storage_of, tensors_in
from ..runtime.memory.meter import Meter
from ..upstream.families import Parts
from . import table

UNITS = {
    "cpu": "resident memory of the process",
    "cuda": "memory allocated by PyTorch on the device",
    "mps": "memory allocated by PyTorch on the device",
}


class Usage(dict):
    """Plain values, ready for JSON. Sizes are bytes.

    ``parts``: the model's weights, by part: ``bytes``, ``device`` (of the first one), ``by`` (bytes by device and
    format). ``weights``: their sum. ``held``: likewise, what passes hold beside them (prepared values, caches, buffers,
    copies, voices), by its name. ``graph_pools``: of CUDA graphs, of the whole process. ``cuda_allocated``,
    ``cuda_peak``: PyTorch's on the model's device. ``process``: ``Resident``. ``fragmentation``: of the device's
    allocator. ``peaks``: by phase, with ``measured``: what is measured, and whether a peak may have been ``missed``.
    ``clearings``, ``transfers``: count, seconds, bytes. ``history``: of the last requests (``Meter.history``).

    Of a model that was not applied to, or before it was: ``parts``, ``weights``, ``cuda_*``, ``process`` only.
    """

    columns = table.COLUMNS

    def rows(self) -> list[tuple[str, ...]]:
        """The table of parts: name, device, format, bytes, as text."""
        return table.rows(self)

    def notes(self) -> list[str]:
        """Lines below the table: peaks, fragmentation, what clearing cost, transfers."""
        return table.notes(self)

    def __str__(self) -> str:
        return table.text(self)

    def plot(self, path: str | PathLike) -> Path:
        """Write a PNG: memory over the time of the last requests, with their phases.

        Raises:
            InvalidRequestError: no request has been recorded yet.
            ImportError: matplotlib is not installed.
        """
        from . import picture  # matplotlib is optional, and slow to import

        return picture.draw(self, Path(path))


def weights(parts: Parts) -> Usage:
    """Bytes of weights by part and device; on CUDA also what the allocator holds and its peak; and of the process."""
    found: dict[str, Any] = {"parts": {}}
    for name, module in parts.modules().items():
        tensors = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}
        by: dict[str, dict[str, int]] = {}
        for tensor in tensors.values():
            formats, kind = by.setdefault(str(tensor.device), {}), str(tensor.dtype).removeprefix("torch.")
            formats[kind] = formats.get(kind, 0) + tensor.numel() * tensor.element_size()
        found["parts"][name] = _entry(by, str(parts.device))
    found["weights"] = sum(entry["bytes"] for entry in found["parts"].values())
    if parts.device.type == "cuda":
        found["cuda_allocated"] = torch.cuda.memory_allocated(parts.device)
        found["cuda_peak"] = max(torch.cuda.max_memory_allocated(parts.device), readings.highest(parts.device) or 0)
    resident = process_memory.resident()
    found["process"] = {name: value for name, value in vars(resident).items() if value is not None} if resident else {}
    return Usage(found)


def holdings(parts: Parts, engines: Engines, voices: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """What may hold tensors beside a model's own, by the name that it has in the table."""
    t3 = engines.token_model
    found = {"t3 cache": getattr(getattr(t3, "backbone", None), "cache", None), "t3": t3}
    return {**found, "flow": engines.flow, "vocoder": engines.vocoder, "voice": parts.voice, "voices": voices, **others}


def usage(parts: Parts, held: Mapping[str, Any], meter: Meter, tally: Tally, transfers: Transfers) -> Usage:
    """All of it.

    Args:
        held: objects that hold tensors beside the model's, by name; what two of them hold counts for the first.
    """
    found = weights(parts)
    own = {storage_of(t)[0] for module in parts.modules().values() for t in (*module.parameters(), *module.buffers())}
    measured = {name: measure(tensors_in(one), own) for name, one in held.items() if one is not None}
    found["held"] = {name: _entry(by, str(parts.device)) for name, by in measured.items() if by}
    found["held_bytes"] = sum(entry["bytes"] for entry in found["held"].values())
    found["graph_pools"] = readings.graph_pools(parts.device)
    found["fragmentation"] = readings.fragmentation(parts.device)
    found["peaks"] = dict(meter.peaks)
    found["measured"] = {"what": UNITS.get(parts.device.type, "nothing"), "missed": meter.missed}
    found["clearings"] = {**tally.to_dict(), **clearing.replacing.to_dict()}
    found["transfers"] = transfers.to_dict()
    found["history"] = meter.history()
    return found


def _entry(by: dict[str, dict[str, int]], device: str) -> dict[str, Any]:
    size = sum(bytes_ for formats in by.values() for bytes_ in formats.values())
    return {"bytes": size, "device": next(iter(by), device), "by": by}
