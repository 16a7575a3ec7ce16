"""One device of ``cluster_model.py``: seconds of T3, flow matching and vocoder, from tables or from counted operations.

A figure is measured (``docs/benchmarks.md``), counted (bytes and operations of the architecture), read from a data
sheet, or assumed; ``Device.source`` says which. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

TOKENS_PER_SECOND, FRAMES_PER_TOKEN = 25, 2  # of audio
PROMPT_FRAMES = 500  # 10 s of a voice, which every call of flow matching solves again
TEXT_PER_TOKEN = 0.4  # text tokens for a speech token, as in upstream/sizes.py
HALF = 2  # bytes of bf16


@dataclass(frozen=True)
class Family:
    """Sizes of an architecture.

    Attributes:
        parameters: of T3's backbone and head, which a step reads once.
        cache: numbers of keys and values that a position has in one row.
        rows: of T3 and of flow matching for one request, with guidance.
        prefix: positions before the text. euler: steps of flow matching.
        kernels: of a token, with Triton, and of a flow step (docs/benchmarks.md, counted).
    """

    parameters: float
    cache: int
    rows: int
    prefix: int
    euler: int
    kernels: tuple[int, int]

    def positions(self, tokens: float) -> float:
        """Positions of the cache in the middle of an utterance."""
        return self.prefix + TEXT_PER_TOKEN * tokens + tokens / 2


FAMILIES = {
    "english": Family(503e6 + 1024 * 8194, 30 * 2 * 1024, 2, 36, 10, (9 * 30, 855)),
    "turbo": Family(311e6 + 1024 * 6563, 24 * 2 * 1024, 1, 377, 2, (9 * 24, 855)),
}


def block_operations(frames: float) -> float:
    """Of one row of a block of the estimator: four products of attention, two of the MLP, scores and their sums."""
    return 2 * frames * (4 * 256 * 512 + 2 * 256 * 1024) + 4 * 512 * frames**2


def estimator_operations(frames: float) -> float:
    """Of one row of a step of flow matching: 56 blocks of width 256 with 8 heads of 64, convolutions between."""
    residual = 3 * 256 * 256 + 256 * 256 * 4  # two convolutions of three frames, one of one frame for the sum
    first, last = (320 + 256) * 3 * 256 + 320 * 256, (512 + 256) * 3 * 256 + 512 * 256
    weights = 12 * residual + first + last + 3 * 3 * 256 * 256 + 256 * 80
    return 56 * block_operations(frames) + 2 * frames * weights


def encoder_operations(frames: float) -> float:
    """Of the encoder of flow matching: 6 layers over tokens, 4 over frames, width 512, relative positions."""
    layer, tokens = 6 * 512 * 512 + 2 * 512 * 2048, frames / FRAMES_PER_TOKEN
    weights = tokens * (6 * layer + 8 * 512 * 512) + frames * (4 * layer + 6 * 512 * 512 + 512 * 80)
    return 2 * weights + 8 * 512 * (6 * tokens**2 + 4 * frames**2)  # scores of positions are twice as many


def vocoder_operations(frames: float) -> float:
    """Of HiFT: three resolutions, three residual blocks in each and one for the source, pitch predictor."""
    total = 80 * 512 * 7 + (80 + 4 * 512) * 512 * 3
    up, source = ((1, 512 * 256 * 16), (8, 256 * 128 * 11), (40, 128 * 64 * 7)), (30 * 18, 6 * 18, 18)
    for rate, channels, kernel, (before, upsample), down in zip(
        (8, 40, 120), (256, 128, 64), (7, 7, 11), up, source, strict=True
    ):
        total += rate * (6 * (3 + 7 + 11 + kernel) * channels**2 + down * channels) + before * upsample
    return 2 * frames * (total + 120 * 64 * 18 * 7)


@dataclass(frozen=True)
class Device:
    """What one model on one device takes.

    Attributes:
        steps: (requests, seconds of a step of T3) with ``timed`` positions in the cache; empty: by operations, bytes.
        prefill: seconds of a request's; 0: by operations.
        bandwidth: bytes a second. rate: operations a second of T3 and flow matching. vocoder: of the vocoder, in fp32.
        kernel: seconds of a kernel in a graph. marking: seconds of the watermark for a second of audio.
        load: seconds until an actor is ready. source: where the figures are from.
    """

    family: Family
    steps: tuple[tuple[float, float], ...]
    timed: float
    prefill: float
    bandwidth: float
    rate: float
    vocoder: float
    kernel: float
    marking: float
    load: float
    source: str
    _steps: dict[tuple[int, int], float] = field(default_factory=dict, init=False, compare=False, repr=False)

    def step(self, requests: int, positions: float) -> float:
        """Seconds of one step of T3, which gives each of the requests a token."""
        key = requests, round(positions)
        if key not in self._steps:
            self._steps[key] = self._step(*key)  # so that it does not matter who asked first
        return self._steps[key]

    def _step(self, requests: int, positions: float) -> float:
        family = self.family
        position = requests * family.rows * family.cache * HALF / self.bandwidth
        if self.steps:
            return interpolated(self.steps, requests) + position * max(0.0, positions - self.timed)
        read = family.parameters * HALF / self.bandwidth + position * positions
        return max(read, 2 * family.parameters * family.rows * requests / self.rate) + family.kernels[0] * self.kernel

    def enter(self, tokens: float) -> float:
        """Seconds of a prefill."""
        positions = self.family.prefix + TEXT_PER_TOKEN * tokens
        return self.prefill or 2 * self.family.parameters * self.family.rows * positions / self.rate

    def flow(self, frames: float) -> float:
        """Seconds of flow matching with its encoder over frames, those of the voice among them."""
        family = self.family
        total = encoder_operations(frames) + family.euler * family.rows * estimator_operations(frames)
        return total / self.rate + family.euler * family.kernels[1] * self.kernel

    def sound(self, tokens: float, before: float = 0) -> float:
        """Seconds of the acoustic half for tokens, where a window also solves some ``before`` and behind."""
        frames = FRAMES_PER_TOKEN * tokens
        vocoder = vocoder_operations(frames) / self.vocoder + self.marking * tokens / TOKENS_PER_SECOND
        return self.flow(PROMPT_FRAMES + frames + FRAMES_PER_TOKEN * before) + vocoder

    def decode(self, lengths: Sequence[float], slots: int) -> float:
        """Seconds of T3 for requests of so many tokens, of which ``slots`` are in the batch at once."""
        positions = self.family.positions(sum(lengths) / len(lengths))
        ends, clock, seconds = sorted(lengths[:slots]), 0.0, sum(map(self.enter, lengths))
        waiting = list(lengths[slots:])[::-1]
        while ends:  # the clock counts steps
            seconds += (ends[0] - clock) * self.step(len(ends), positions)
            clock = ends.pop(0)
            if waiting:
                end = clock + waiting.pop()
                ends.insert(bisect_left(ends, end), end)
        return seconds

    def batch(self, lengths: Sequence[float], slots: int) -> float:
        """Seconds of a batch of lines: all tokens, then all audio."""
        return self.decode(lengths, slots) + sum(map(self.sound, lengths))


def interpolated(table: Sequence[tuple[float, float]], at: float) -> float:
    """Between the points of a table, and beyond them as between the last two."""
    if len(table) == 1:
        return table[0][1]
    index = min(max(1, bisect_left(table, (at, 0.0))), len(table) - 1)
    (x, low), (y, high) = table[index - 1], table[index]
    return max(1e-12, low + (at - x) * (high - low) / (y - x))


PROFILES = ("cpu", "gpu-small", "gpu-large")
MEASURED = "measured on two cores of an AMD EPYC, preset fast (docs/benchmarks.md)"
SHEET = "not measured: operations and bytes counted, rates of a data sheet, {} s a kernel assumed"


def profiles(family: str, share: float) -> dict[str, Device]:
    """By name. ``share``: of a GPU's rates that is reached, 1 for floors."""
    sizes = FAMILIES[family]
    frames = 900 if family == "english" else 906  # of the calls whose seconds of flow matching and vocoder are known
    flow, vocoder = (8.81, 1.11) if family == "english" else (1.44, 1.12)
    rows = ((1, 23.9), (2, 27.9), (4, 30.8), (8, 39.2), (16, 49.7))  # ms of a step of English, T3 in bf16
    if family == "english":
        steps, timed = tuple((count / 2, ms / 1000) for count, ms in rows if count > 1), 200.0
    else:  # one row is measured (21.6 ms); more rows as with English
        steps, timed = tuple((count, 0.0216 * ms / rows[0][1]) for count, ms in rows), sizes.positions(200)
    operations = encoder_operations(frames) + sizes.euler * sizes.rows * estimator_operations(frames)
    prefill = 0.33 if family == "english" else 0.55  # eight together; (24.6 ms - 21.6 ms) x 200 and (28.1 - 19.6) x 60
    cpu = Device(
        family=sizes,
        steps=steps,
        timed=timed,
        prefill=prefill,
        bandwidth=43e9,
        rate=operations / flow,
        vocoder=vocoder_operations(400) / vocoder,
        kernel=0.0,
        marking=0.03 / 8,
        load=16.0,  # 11 s to load, up to 5 s for huge pages
        source=MEASURED,
    )
    kernel = 2e-6
    floor = replace(cpu, steps=(), prefill=0.0, kernel=kernel, load=30.0, source=SHEET.format(kernel))
    small = replace(floor, bandwidth=300e9 * share, rate=121e12 * share, vocoder=30e12 * share)
    large = replace(floor, bandwidth=3350e9 * share, rate=989e12 * share, vocoder=67e12 * share)
    return dict(zip(PROFILES, (cpu, small, large), strict=True))


def from_bench(device: Device, path: Path) -> Device:
    """One request's figures from ``chatterbox-turbo bench --json``; more requests as the device's own table goes.

    Raises:
        SystemExit: the file has no runs of a model that speaks.
    """
    runs = [pair["optimized"] for pair in json.loads(path.read_text()).get("runs", [])]
    if not runs or not all(run.get("t3_step") and run.get("flow") and run.get("vocoder") for run in runs):
        raise SystemExit(f"{path} has no runs with t3_step, flow and vocoder: `chatterbox-turbo bench --json {path}`.")

    def mean(name: str) -> float:
        return sum(run[name] for run in runs) / len(runs)

    tokens, family = mean("tokens"), device.family
    frames, positions = FRAMES_PER_TOKEN * tokens, family.positions(tokens)
    own = device.step(1, positions)
    steps = tuple((n, mean("t3_step") / 1000 * device.step(n, positions) / own) for n in (1, 2, 4, 8, 16))
    solved = PROMPT_FRAMES + frames
    operations = encoder_operations(solved) + family.euler * family.rows * estimator_operations(solved)
    return replace(
        device,
        steps=steps,
        timed=positions,
        prefill=max(1e-6, (mean("t3") - mean("t3_step")) * tokens / 1000),
        rate=operations / mean("flow"),
        vocoder=vocoder_operations(frames) / mean("vocoder"),
        kernel=0.0,
        marking=mean("watermark") * TOKENS_PER_SECOND / tokens if "watermark" in runs[0] else device.marking,
        source=f"{path.name} for one request, more by the ratios of: {device.source}",
    )


def with_figures(device: Device, figures: Mapping[str, float | None], points: Sequence[str]) -> Device:
    """Figures replaced by those that are given, tokens a second by ``REQUESTS:TOKENS_PER_SECOND``."""
    given = {name: value for name, value in figures.items() if value is not None}
    if points:
        pairs = sorted(tuple(map(float, point.split(":"))) for point in points)
        given |= {"steps": tuple((requests, requests / speed) for requests, speed in pairs), "timed": math.inf}
    names = ", ".join(name for name in given if name != "timed")
    return replace(device, **given, source=f"{names} given; else {device.source}" if given else device.source)
