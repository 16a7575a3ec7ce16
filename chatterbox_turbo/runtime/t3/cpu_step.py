"""The decode step on a CPU by ``cpu.step_kernels``: a call a layer, every thread busy with reading weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu.arrays import array, arrays
from ..cpu.threads import kernel_threads, why_no_kernels
from ..device.quantized import QuantizedMatrix
from ..layers import Linear, Norm
from .kv_cache import BUCKET, KVCache, bucketed
from .operations import Watch
from .weights import Weights

FORMATS = (torch.float32, torch.bfloat16)


def unsuitable(weights: Weights) -> str:
    """Why the kernels cannot run these weights, or an empty string."""
    if weights.device.type != "cpu":
        return f"the weights are on {weights.device}"
    if weights.dtype not in FORMATS:
        return f"the weights are {weights.dtype}"
    reason = why_no_kernels()
    if reason:
        return reason
    from ..cpu.products import GRANULE
    from ..cpu.quantized_products import why_not

    inner = set(_plain_inner(weights))
    if any(size % GRANULE for size in inner) or weights.head_width % 2:
        return f"sizes {sorted(inner)} are no multiples of {GRANULE}"
    quantized = {(m.scheme, m.size(1)) for m in weights.matrices() if isinstance(m, QuantizedMatrix)}
    return next((reason for scheme, size in sorted(quantized) if (reason := why_not(scheme, size))), "")


def _plain_inner(weights: Weights) -> list[int]:
    """Numbers of inputs of the matrices that are not quantized."""
    return [matrix.size(1) for matrix in weights.matrices() if not isinstance(matrix, QuantizedMatrix)]


class CpuStep:
    """One position more in every row in use, as ``transformer.decode_step``, within fp32 rounding."""

    captured = False

    def __init__(self, weights: Weights, watch: Watch = ()):
        from ..cpu import instructions as cpu_instructions
        from ..cpu import products as cpu_products
        from ..cpu import step_kernels as cpu_kernels

        self.cache_dtype = weights.dtype
        self._kernels, self._weights, self._watch = cpu_kernels, weights, watch
        self._layers = [
            (
                _norm(layer.attention_norm),
                _linear(layer.qkv),
                _linear(layer.out),
                _norm(layer.mlp_norm),
                _linear(layer.up),
                _linear(layer.down),
            )
            for layer in weights.layers
        ]
        self._final, self._head = _norm(weights.final_norm), _linear(weights.head)
        self._turn = (np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))
        self._scratch: dict[str, np.ndarray] = {}
        plain = _plain_inner(weights)
        # bf16 activations, as on a GPU
        self._pairs = (
            weights.dtype == torch.bfloat16
            and cpu_instructions.multiplies_pairs()
            and not any(size % (2 * cpu_products.GRANULE) for size in plain)
        )
        self._integers = cpu_instructions.multiplies_integers()
        # the widest input of a product in bf16, and of a quantized one
        self._widest = max(plain, default=0) if self._pairs else 0
        quantized = (matrix.size(1) for matrix in weights.matrices() if isinstance(matrix, QuantizedMatrix))
        self._widest_quantized = max(quantized, default=0)

    def __call__(self, cache: KVCache, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, kernels = self._weights, self._kernels
        rows, capacity = embeds.size(0), bucketed(max(cache.lengths) + 1)
        lengths = np.array(cache.lengths, np.int64)
        x = embeds.float()
        if weights.positions is not None:
            x = x + weights.positions[torch.from_numpy(lengths)].float()
        x = x.contiguous().clone().numpy() if x is embeds else x.contiguous().numpy()
        turn = self._turning(capacity)
        scratch = self._buffers(rows, capacity)
        keys, values = array(cache.keys), array(cache.values)
        attention = np.zeros((rows, capacity), np.float32) if self._watch else None
        with kernel_threads() as threads:
            for index, layer in enumerate(self._layers):
                kernels.block(x, *layer, turn, (keys[index], values[index]), lengths, weights.gated, scratch, threads)
                for _, head in (pair for pair in self._watch if pair[0] == index):
                    for row, length in enumerate(cache.lengths):
                        attention[row, : length + 1] += scratch[3][row, head, : length + 1]
            logits = np.empty((rows, weights.head.weight.size(0)), np.float32)
            kernels.head(x, self._final, self._head, logits, scratch, threads)
        if attention is not None:
            attention /= len(self._watch)
        return torch.from_numpy(logits), None if attention is None else torch.from_numpy(attention)

    def _turning(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of all positions, computed once for each size of the cache."""
        if self._weights.inverse_frequencies is not None and len(self._turn[0]) < capacity:
            tables = self._weights.rotary(torch.arange(capacity + BUCKET))
            self._turn = tuple(table.contiguous().numpy() for table in tables)
        return self._turn

    def _buffers(self, rows: int, capacity: int) -> tuple[Any, ...]:
        """What ``step_kernels.block`` writes to, kept from step to step."""
        weights, quantized = self._weights, self._widest_quantized
        width, wide = weights.width, weights.layers[0].up.weight.size(0)
        words, octets = (torch.int16, torch.int8) if self._integers else (torch.float32, torch.float32)
        h, narrow, qkv, scores, inner, low, *others = (
            self._buffer(name, shape, dtype)
            for name, shape, dtype in (
                ("h", (rows, width), torch.float32),
                ("narrow", (rows, width), torch.float32),
                ("wide", (rows, 3 * width), torch.float32),
                ("scores", (rows, weights.heads, capacity), torch.float32),
                ("inner", (rows, wide), torch.float32),
                ("low", (rows, self._widest), torch.int16 if self._pairs else torch.float32),
                ("words", (rows, quantized if self._integers else 0), words),
                ("octets", (rows, quantized if self._integers else 0), octets),
                ("factors", (rows, quantized // 64), torch.float32),
                ("sums", (rows, quantized // 64), torch.float32),
            )
        )
        return h, narrow, qkv, scores, inner, (low, tuple(others))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        if name not in self._scratch or self._scratch[name].shape != shape:
            # torch's blocks begin with a line of the cache, NumPy's in the middle of one: two lines a vector
            self._scratch[name] = torch.empty(shape, dtype=dtype).numpy()
        return self._scratch[name]


def _linear(linear: Linear) -> tuple[Any, np.ndarray]:
    return _matrix(linear.weight), _vector(linear.bias)


def _matrix(weight: Tensor | QuantizedMatrix) -> Any:
    """As the kernels read it: an array, or codes, scales and zeros."""
    return arrays(weight) if isinstance(weight, QuantizedMatrix) else array(weight)


def _norm(norm: Norm) -> tuple[np.ndarray, np.ndarray, Any]:
    return _vector(norm.weight), _vector(norm.bias), np.float32(norm.eps)


def _vector(vector: Tensor | None) -> np.ndarray:
    return np.empty(0, np.float32) if vector is None else vector.detach().float().numpy()
