"""What only a GPU can tell: graphs that were captured and replayed, waits for the device, tokens a second."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..api import optimized
from ..config import Config
from ..runtime.device.graphs import Tally, tallying
from ..runtime.device.tf32 import convolves_in_tf32, full_precision
from ..upstream.families import identify
from .benchmark import Run, run
from .beside import beside_upstream
from .fidelity import compare_samples, sample

SHOWN = 12  # places of waits, most frequent first
_SYNC = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Side:
    """One call of ``generate``, and the same call again with CUDA's debug mode for synchronizing operations.

    ``waits``: how often the host waited for the device, by place. ``first``, ``again``: graphs of the first call after
    ``apply`` and of the next one.
    """

    tokens: int
    seconds: float
    tokens_per_second: float
    bandwidth_share: float
    waits: dict[str, int]
    first: Tally = field(default_factory=Tally)
    again: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Findings:
    """Both sides of one model, and the samples' agreement (dB) without TF32 and with torch's own settings."""

    family: str
    gpu: dict[str, Any]
    upstream: Side
    optimized: Side
    full_precision_db: float
    default_db: float
    convolves_in_tf32: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a reader, and to be sent to us."""
        gpu = ", ".join(f"{name} {value}" for name, value in self.gpu.items() if value)
        said = [f"{self.family} on a GPU: {gpu}"]
        for title, side in (("upstream", self.upstream), ("optimized", self.optimized)):
            speed = f"{side.tokens_per_second:.1f} tokens/s, {side.bandwidth_share:.0%} of the bandwidth; "
            waits = f"{sum(side.waits.values())} waits for the device"
            each = f" ({sum(side.waits.values()) / side.tokens:.2f} a token)" if side.tokens else ""
            said.append(f"  {title}: {side.seconds:.3f} s, {speed if side.tokens else ''}{waits}{each}")
            most = sorted(side.waits.items(), key=lambda item: -item[1])
            said += [f"    {number} x {place}" for place, number in most[:SHOWN]]
            if len(most) > SHOWN:
                said.append(f"    and {len(most) - SHOWN} places more")
        for title, tally in (("first call", self.optimized.first), ("next call", self.optimized.again)):
            said.append(f"  graphs, {title}: {tally.captures} captured, {tally.replays} replayed")
            said += [f"    without a graph: {key}: {reason}" for key, reason in tally.failures]
        default = "convolutions in TF32" if self.convolves_in_tf32 else "as torch is set"
        said.append(f"  samples: {self.full_precision_db:.0f} dB without TF32, {self.default_db:.0f} dB {default}")
        return said


def examine(model: Any, config: Config, request: dict[str, Any], seed: int = 0) -> Findings:
    """Speak as upstream and optimized, several times each; the model is left as it was.

    Args:
        model: on CUDA, not optimized.
        request: keyword arguments of ``generate``.
    """
    parts = identify(model)
    run(model, seed, request)  # warm-up
    theirs = run(model, seed, request, bandwidth=True)
    upstream = _side(theirs, _waits(model, seed, request))
    with full_precision():
        reference = sample(model, seed, request)
    with optimized(model, beside_upstream(model, config, [request]).config):
        with tallying() as first:
            run(model, seed, request)
        with tallying() as again:
            ours = run(model, seed, request, bandwidth=True)
        side = _side(ours, _waits(model, seed, request), first, again)
        with full_precision():
            precise = sample(model, seed, request)
    return Findings(
        parts.family,
        describe_gpu(parts.device),
        upstream,
        side,
        compare_samples(model, precise, reference).snr_db,
        compare_samples(model, ours.sample, theirs.sample).snr_db,
        convolves_in_tf32(parts.device),
    )


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name, capability, memory, and the versions of everything between it and torch."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "GiB": round(torch.cuda.get_device_properties(device).total_memory / 2**30),
        "driver": _driver(),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "Triton": _triton(),
    }


def _side(done: Run, waits: dict[str, int], first: Tally | None = None, again: Tally | None = None) -> Side:
    figures = done.metrics
    return Side(
        done.tokens,
        done.sample.seconds,
        1000 / figures["t3_step"] if figures.get("t3_step") else 0.0,
        figures.get("bandwidth_share", 0.0),
        waits,
        first or Tally(),
        again or Tally(),
    )


def _waits(model: Any, seed: int, request: dict[str, Any]) -> dict[str, int]:
    """Places where one call waits for the device, by CUDA's own account, with their numbers."""
    with _noticing_waits() as noticed:
        sample(model, seed, request)
    return dict(Counter(f"{_short(one.filename)}:{one.lineno}" for one in noticed if _SYNC in str(one.message)))


@contextmanager
def _noticing_waits() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield noticed
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _short(path: str) -> str:
    """A path from its package on."""
    return re.split(r"site-packages/|(?=chatterbox_turbo/)", path)[-1]


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
