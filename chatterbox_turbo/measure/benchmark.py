"""Speed and memory of upstream and optimized calls, interleaved in one process on one model.

Both sides share whatever else the machine does, so that their ratio means more than either number.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..api import optimized
from ..config import Config
from ..errors import SpeechTruncatedWarning
from ..passes.base import Pass
from ..plan import Plan
from ..runtime.device.quantized import QuantizedLinear
from ..upstream import t3 as upstream_t3
from ..upstream import warmup
from ..upstream.families import Parts, identify
from .beside import beside_upstream
from .fidelity import Comparison, Sample, compare_samples, sample
from .levels import memory_levels

WARM_UP_TOKENS = 12
BUFFER_BYTES = 512 * 2**20  # far above any cache
READS = 7
PHASES = ("conditionals", "flow", "vocoder", "watermark")


@dataclass(frozen=True)
class Run:
    """One generation and the highest memory use during it, in bytes (CUDA: the allocator's, else resident).

    ``step_seconds``: a token's, without the prefill; 0 where there are too few. ``bytes_per_token``: weights that
    one of them reads. ``bandwidth``: bytes per second that the device read just before; 0 where not measured.
    ``memory``: bytes in use by phase, ``Levels.by_phase``.
    """

    sample: Sample
    audio_seconds: float
    peak_bytes: int
    step_seconds: float = 0.0
    bytes_per_token: int = 0
    bandwidth: float = 0.0
    memory: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of this run by name; units in ``UNITS``. ``t3`` includes the prefill, ``t3_step`` does not."""
        values = {phase: self.sample.phases[phase] for phase in PHASES if phase in self.sample.phases}
        if self.tokens:
            steps = {"t3_step": 1000 * self.step_seconds} if self.step_seconds else {}
            values = {"t3": 1000 * self.sample.phases["t3"] / self.tokens, **steps, **values}
        values["end_to_end"] = self.sample.seconds
        values["real_time_factor"] = self.sample.seconds / self.audio_seconds
        values["peak_memory"] = self.peak_bytes / 2**20
        if self.bandwidth and self.step_seconds:
            values["bandwidth_share"] = self.bytes_per_token / self.step_seconds / self.bandwidth
        return values

    @property
    def tokens(self) -> int:
        """Speech tokens that T3 produced; 0 for voice conversion."""
        return 0 if self.sample.tokens is None else self.sample.tokens.numel()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the audio."""
        return {
            "tokens": self.tokens,
            "audio_seconds": self.audio_seconds,
            "phases": self.sample.phases,
            "memory": self.memory,
            "t3_bytes_per_token": self.bytes_per_token,
            "memory_bandwidth_bytes_per_second": self.bandwidth,
            **self.metrics,
        }


UNITS = {
    "t3": "ms/token",
    "t3_step": "ms/token",
    **dict.fromkeys(PHASES, "s"),
    "end_to_end": "s",
    "real_time_factor": "",
    "peak_memory": "MiB",
    "bandwidth_share": "",
}


@dataclass(frozen=True)
class Range:
    """Median, least and greatest of one figure over the runs of one side."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range:
        """The range of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Metric:
    """One figure on both sides; ``ratio`` is the median of upstream / optimized, pair by pair."""

    name: str
    unit: str
    upstream: Range
    optimized: Range
    ratio: float


@dataclass(frozen=True)
class Benchmark:
    """Pairs of runs (upstream, optimized) of the same request and seed, and what was applied.

    ``notes``: how that differs from what was asked for, and why (``beside``).
    """

    pairs: list[tuple[Run, Run]]
    plan: Plan
    comparison: Comparison  # of the last pair
    apply_seconds: list[float]
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[Metric]:
        """Every figure that both sides have, in the order of ``UNITS``."""
        rows = []
        values = [(upstream.metrics, ours.metrics) for upstream, ours in self.pairs]
        for name, unit in UNITS.items():
            if all(name in a and name in b for a, b in values):
                ours, theirs = [b[name] for _, b in values], [a[name] for a, _ in values]
                ratio = statistics.median(a / b if b else float("nan") for a, b in zip(theirs, ours, strict=True))
                rows.append(Metric(name, unit, Range.of(theirs), Range.of(ours), ratio))
        return rows

    @property
    def unmatched(self) -> list[str]:
        """Figures that only one side has, because a phase could not be timed on the other."""
        sides = [[set(run.metrics) for run in pair] for pair in self.pairs]
        return sorted(set().union(*(a ^ b for a, b in sides)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "runs": [{"upstream": a.to_dict(), "optimized": b.to_dict()} for a, b in self.pairs],
            "metrics": {metric.name: asdict(metric) for metric in self.metrics},
            "unmatched": self.unmatched,
            "comparison": asdict(self.comparison),
            "apply_seconds": self.apply_seconds,
            "passes": [asdict(step) for step in self.plan.steps],
            "notes": list(self.notes),
        }


def measure(
    model: Any,
    config: Config,
    request: dict[str, Any],
    seed: int,
    runs: int,
    *,
    passes: Sequence[Pass] = (),
    warm_up_both: bool = True,
    bandwidth: bool = True,
    announce: Callable[[str], None] = lambda step: None,
) -> Benchmark:
    """Upstream, optimized, optimized, upstream, … after a warm-up; the model is left as it was.

    The configuration is applied anew for each optimized run, outside of its time. What a pass builds on first
    use is part of the run, unless ``warmup.level`` asks for it at ``apply``.

    Args:
        request: keyword arguments of ``generate``.
        seed: set before every run, so that the two sides of a pair speak the same tokens where they agree.
        warm_up_both: warm up optimized as well; upstream's warm-up pays for what both share.
        bandwidth: measure the memory bandwidth of the model's device, before each run.
        announce: called with a line before each step.
    """
    asked = beside_upstream(model, config, [request], passes)
    config = asked.config
    announce("warming up")
    warm_up(model, request)
    if warm_up_both:
        with optimized(model, config, passes=passes):
            warm_up(model, request)
    pairs, applied = [], []
    for number in range(1, runs + 1):
        theirs = None
        if number % 2:  # the order changes from pair to pair, so that a machine that drifts favours neither side
            announce(f"upstream, run {number} of {runs}")
            theirs = run(model, seed, request, bandwidth)
        announce(f"optimized, run {number} of {runs}")
        start = time.perf_counter()
        with optimized(model, config, passes=passes):
            applied.append(time.perf_counter() - start)
            plan = model.turbo.plan
            ours = run(model, seed, request, bandwidth)
        if theirs is None:
            announce(f"upstream, run {number} of {runs}")
            theirs = run(model, seed, request, bandwidth)
        pairs.append((theirs, ours))
    comparison = compare_samples(model, pairs[-1][1].sample, pairs[-1][0].sample)
    return Benchmark(pairs, replace(plan, asked=asked.plan.request), comparison, applied, asked.notes)


def run(model: Any, seed: int, request: dict[str, Any], bandwidth: bool = False) -> Run:
    """One generation as the model is now, and before it the memory bandwidth where that is asked for."""
    parts = identify(model)
    speed = read_bandwidth(parts.device) if bandwidth and parts.t3 is not None else 0.0
    with memory_levels(parts.device) as levels, embedding_times(parts) as times:
        result = sample(model, seed, request)
    step = 0.0
    if result.tokens is not None and (steps := result.tokens.numel() - 2) > 0:
        times = _arrivals(model) or times
        # the last token is never embedded; whatever was before the others belongs to the prefix
        step = (times[-1] - times[-1 - steps]) / steps if len(times) > steps else 0.0
    size = 0 if parts.t3 is None else t3_bytes(parts)
    return Run(
        result, result.wav.shape[-1] / model.sr, levels.highest, step, size, speed, levels.by_phase(result.memory)
    )


def _arrivals(model: Any) -> list[float]:
    """When tokens reached the host, where a graph embeds them; its first ones arrive while others are on their way."""
    engine = getattr(getattr(model, "turbo", None), "token_model", None)
    return engine.arrivals if engine is not None and identify(model).device.type == "cuda" else []


@contextmanager
def embedding_times(parts: Parts) -> Iterator[list[float]]:
    """When T3 embeds speech tokens, upstream's loop and this package's alike: once a token, and before the prefill."""
    times: list[float] = []
    if parts.t3 is None:
        yield times
        return
    hook = upstream_t3.speech_embedding(parts.t3).register_forward_pre_hook(
        lambda *_: times.append(time.perf_counter())
    )
    try:
        yield times
    finally:
        hook.remove()


def warm_up(model: Any, request: dict[str, Any]) -> None:
    """A few tokens and their audio, and the reference voice where the request names one.

    The model's voice and the random generators are left as they were.
    """
    parts = identify(model)
    attribute, voice = warmup.voice_attribute(parts), parts.voice
    reference = request.get("audio_prompt_path") or request.get("target_voice_path")
    devices = [parts.device] if parts.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeechTruncatedWarning)
        try:
            setattr(model, attribute, warmup.copy_voice(voice))
            if reference:
                warmup.prepare_voice(parts, Path(reference))
            if identify(model).voice is not None:
                warmup.speak(identify(model), WARM_UP_TOKENS)
        finally:
            setattr(model, attribute, voice)


def t3_bytes(parts: Parts) -> int:
    """Bytes of weights that one decoding step reads once: the backbone's and the head's, not the embeddings."""
    backbone = upstream_t3.backbone(parts.t3)
    embeddings = {id(p) for m in backbone.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    quantized = (b for m in backbone.modules() if isinstance(m, QuantizedLinear) for b in m.buffers())
    weights = {id(p): p for p in (*backbone.parameters(), *quantized, *upstream_t3.head(parts.t3).parameters())}
    return sum(p.numel() * p.element_size() for key, p in weights.items() if key not in embeddings)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which all threads read a large buffer: the median of several sums of it."""
    buffer = torch.ones(BUFFER_BYTES // 4, device=device)
    seconds = []
    for _ in range(READS + 1):
        start = time.perf_counter()
        buffer.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return BUFFER_BYTES / statistics.median(seconds[1:])
