"""Which implementation of the decode step is fastest here: measured once on the real weights, remembered on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...errors import describe
from ..cpu.measurements import cache_folder, processor, read, write
from ..device.compilation import compiled
from ..device.quantized import QuantizedMatrix
from .backbone import Step, TorchStep
from .cpu_step import CpuStep, unsuitable
from .kv_cache import BUCKET, KVCache
from .operations import PLAIN, Operations, Watch
from .transformer import decode_step, prefill
from .weights import Weights

ROWS = (1, 2, 4, 8, 16)  # what is measured; between two of them the larger one counts
LAYERS = 3  # enough to be larger than a cache of 32 MB, few enough to take a second
REPEATS = 5
KERNELS = 6  # goes up when cpu.step_kernels or cpu.products changes: what was measured with others does not count


@dataclass(frozen=True)
class Choice:
    """``names``: the fastest implementation for each of ``ROWS``. ``remark``: what was measured, for the report."""

    names: dict[int, str]
    remark: str

    def name(self, rows: int) -> str:
        """The implementation for a number of rows."""
        return self.names[next((measured for measured in self.names if measured >= rows), max(self.names))]


class ChosenStep:
    """A step that takes the implementation which is fastest for the number of rows."""

    captured = False

    def __init__(self, choice: Choice, weights: Weights, watch: Watch):
        self.choice = choice
        self._steps = {name: make_step(name, weights, watch) for name in sorted(set(choice.names.values()))}
        formats = {step.cache_dtype for step in self._steps.values()}
        self.cache_dtype = formats.pop() if len(formats) == 1 else torch.float32  # all of them read that

    def __call__(self, cache: KVCache, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._steps[self.choice.name(embeds.size(0))](cache, embeds)


def make_step(name: str, weights: Weights, watch: Watch = ()) -> Step:
    """An implementation by its name, ``numba`` or ``torch``."""
    return CpuStep(weights, watch) if name == "numba" else TorchStep(weights, watch)


def choose_step(weights: Weights, watch: Watch, kernel: str, graphs: bool) -> tuple[Step, str]:
    """The step for these weights, and a remark for the report.

    Args:
        kernel: ``auto``, ``torch``, ``numba`` or ``compile``.
        graphs: a CUDA graph around the whole token, on CUDA.
    """
    if weights.device.type != "cpu" or kernel in ("torch", "compile"):
        name, function, reason = _function(weights, kernel)
        captured = graphs and weights.device.type == "cuda"
        remark = f"{name} step{' in CUDA graphs' if captured else ''}" + (f" ({reason})" if reason else "")
        return TorchStep(weights, watch, captured, function), remark
    reason = unsuitable(weights)
    if reason:
        return TorchStep(weights, watch), f"torch step: {reason}"
    if kernel == "numba" or weights.schemes:  # torch makes whole matrices plain: never faster
        step = CpuStep(weights, watch)
        _compile(weights, step.cache_dtype)
        schemes = f" ({', '.join(weights.schemes)})" if weights.schemes else ""
        return step, f"numba step{schemes}"
    choice = fastest(weights)
    chosen = ChosenStep(choice, weights, watch)
    if "numba" in choice.names.values():
        _compile(weights, chosen.cache_dtype)
    return chosen, choice.remark


def _compile(weights: Weights, cache_dtype: torch.dtype) -> None:
    """Have the kernels ready: where the choice is known and they are not on disk, the first call waits 9 s else.

    They are compiled for the format of the cache as well, and that may be the one that torch's step reads.
    """
    kinds = {tuple(_kind(linear.weight) for linear in (layer.qkv, layer.out, layer.up, layer.down)): layer
             for layer in weights.layers}  # fmt: skip
    one = replace(weights, layers=tuple(kinds.values()))
    with torch.inference_mode():
        for rows in (1, 2, ROWS[-1]):  # each takes others
            _step_of(one, "numba", rows, cache_dtype)()


def _kind(matrix: Tensor | QuantizedMatrix) -> str:
    """What a kernel is compiled for."""
    return matrix.scheme if isinstance(matrix, QuantizedMatrix) else str(matrix.dtype)


def _function(weights: Weights, kernel: str) -> tuple[str, Callable, str]:
    """Name and function of the step in torch, and why it is not the one that was asked for."""
    if kernel == "compile":
        function, reason = compiled(decode_step, device=weights.device, dynamic=weights.device.type == "cpu")
        return "torch" if reason else "compiled", function, reason
    if kernel == "torch" or weights.device.type != "cuda":
        return "torch", decode_step, ""
    operations, reason = fused_operations(weights)
    return "torch" if reason else "fused", partial(decode_step, operations=operations), reason


def fused_operations(weights: Weights) -> tuple[Operations, str]:
    """Triton's kernels, once they have agreed with torch's on the first layer here; or torch's, and the reason."""
    try:
        from . import fused
    except ImportError as error:
        return PLAIN, f"no fused kernels: {describe(error)}"
    try:
        reason = fused.unsuitable(weights) or _disagreement(weights, fused.FUSED)
    except Exception as error:  # no compiler for its launcher, a driver that is too old, a kernel that does not compile
        reason = describe(error)
    return (PLAIN, f"no fused kernels: {reason}") if reason else (fused.FUSED, "")


def _disagreement(weights: Weights, operations: Operations) -> str:
    some = replace(weights, layers=weights.layers[:1])
    numbers = torch.arange(2 * BUCKET * some.width, dtype=torch.float32, device=some.device)
    angles = numbers.reshape(2, BUCKET, -1) * 0.37
    embeds, results = angles.sin(), []
    for each in (PLAIN, operations):
        cache = KVCache(1, some.heads, some.head_width, some.dtype, some.device)
        cache.begin(2)
        cache.ensure(2 * BUCKET)
        prefill(some, cache, embeds[:, :-1])
        for watch in ((), ((0, 0),)):
            logits, attention = decode_step(some, cache, embeds[:, -1], cache.device_lengths, 2 * BUCKET, watch, each)
        results.append((logits, attention, cache.keys.float(), cache.values.float()))
    # rounding, also that of TF32 where it is on; a fault is larger
    bound = 2e-3 if some.dtype == torch.float32 else 5e-2
    for name, plain, fused in zip(("logits", "attention", "keys", "values"), *results, strict=True):
        error = ((plain - fused).abs().max() / plain.abs().max()).item()
        if not error < bound:
            return f"their {name} differ from torch's by {error:.1e}"
    return ""


def fastest(weights: Weights) -> Choice:
    """Measure the implementations on the first layers of ``weights``, or read what was measured before."""
    key = _machine(weights)
    known = measured()
    if key not in known:
        known[key] = measure(weights)
        write(steps_file(), known)
    table = {int(rows): times for rows, times in known[key].items()}
    names = {rows: min(times, key=times.__getitem__) for rows, times in table.items()}
    sample = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in sorted(table[2].items()))
    few, many = names[2], names[max(names)]
    remark = f"{few} step" if few == many else f"{few} step, {many} from {_crossover(names)} rows on"
    return Choice(names, f"{remark} ({sample} ms a layer at 2 rows)")


def _crossover(names: dict[int, str]) -> int:
    last = names[max(names)]
    return min(rows for rows in names if all(names[more] == last for more in names if more >= rows)) // 2 + 1


def measure(weights: Weights) -> dict[str, dict[str, float]]:
    """Seconds a layer by rows and implementation: the least of several runs after a warm-up."""
    some = replace(weights, layers=weights.layers[:LAYERS])
    table: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for rows in ROWS:
            names = ("torch", "numba")
            table[str(rows)] = {name: _seconds(_step_of(some, name, rows)) / len(some.layers) for name in names}
    return table


def _step_of(weights: Weights, name: str, rows: int, cache_dtype: torch.dtype | None = None) -> Callable[[], object]:
    """An implementation's step over a cache of its own, in the format that it prefers or another, for so many rows."""
    step = make_step(name, weights)
    dtype = cache_dtype or step.cache_dtype
    cache = KVCache(len(weights.layers), weights.heads, weights.head_width, dtype, weights.device)
    cache.begin(rows)
    cache.ensure(BUCKET)
    cache.append(rows, BUCKET // 2)
    return partial(step, cache, torch.zeros(rows, weights.width))


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[2:])  # whatever else the machine does only adds to it, and the result is kept for long


def steps_file() -> Path:
    """Where measurements are kept."""
    return cache_folder() / "steps.json"


def measured() -> dict:
    """What has been measured here, by machine, threads, format and shapes."""
    return read(steps_file())


def _machine(weights: Weights) -> str:
    """What a measurement depends on."""
    import numba

    shape = "x".join(str(matrix.size(0)) for matrix in weights.matrices()[:4]) + f"x{weights.width}"
    versions = f"torch {torch.__version__}, numba {numba.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, {weights.dtype}, {shape}, {versions}, kernels {KERNELS}"
