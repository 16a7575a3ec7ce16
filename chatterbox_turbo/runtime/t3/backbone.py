"""Backbones for the token loop: upstream's Transformers model, and a static one of this package's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device.graphs import GraphRunner
from .kv_cache import KVCache, bucketed
from .transformer import Watch, decode_step, prefill
from .weights import Weights

PREFILL_POSITIONS = 2048  # of all rows of one prefill, padding included


class TransformersBackbone:
    """Runs a Llama or GPT-2 of Transformers with its own growing caches, one request after the other.

    Against upstream's backend: not rebuilt for every call (and so not registered as a submodule of T3), no
    hidden states of every layer, and the head on the last position of the prefill only.

    Args:
        model: takes ``inputs_embeds`` (R, S, D), ``past_key_values`` (or ``cache``) and ``use_cache``.
        head: hidden state (R, 1, D) to logits (R, 1, V).
        attention_maps: ask for attention maps, where that decides which kernel runs.
    """

    def __init__(self, model: nn.Module, head: nn.Module, attention_maps: bool = False):
        self.model, self.head = model, head
        self._options = {"output_attentions": True} if attention_maps else {}
        # the old name still works where there is a new one, with a warning at each call
        self._cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._caches: list[Any] = []

    def begin(self, requests: int, rows: int) -> None:
        self._caches, self._rows = [], rows

    def admit(self, embeds: Sequence[Tensor], limits: Sequence[int]) -> Tensor:
        self._caches += [None] * len(embeds)
        first = len(self._caches) - len(embeds)
        return torch.cat([self._advance(first + number, one) for number, one in enumerate(embeds)])

    def step(self, embeds: Tensor) -> tuple[Tensor, None]:
        each = embeds[:, None].split(self._rows)
        return torch.cat([self._advance(number, rows) for number, rows in enumerate(each)]), None

    def leave(self, number: int) -> None:
        self._caches[number] = self._caches[-1]
        self._caches.pop()

    def _advance(self, number: int, embeds: Tensor) -> Tensor:
        output = self.model(
            inputs_embeds=embeds,
            use_cache=True,
            return_dict=True,
            **{self._cache_name: self._caches[number]},
            **self._options,
        )
        self._caches[number] = getattr(output, self._cache_name)
        return self.head(output.last_hidden_state[:, -1:])[:, -1]


class Step(Protocol):
    """One position more in every row in use, with a cache of ``cache_dtype``."""

    cache_dtype: torch.dtype

    def __call__(self, cache: KVCache, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """(R, D) to logits (R, V) fp32 and, where heads are watched, attention (R, C) fp32; lengths stay."""


class TorchStep:
    """``transformer.decode_step``, replayed as a CUDA graph where ``disable`` is false.

    Graphs are captured for a bounded number of shapes: rows by fours, positions by buckets.

    Args:
        disable: no graphs.
        function: ``decode_step``, or what a compiler has made of it.
    """

    def __init__(self, weights: Weights, watch: Watch = (), disable: bool = True, function: Callable = decode_step):
        # attention kernels on CPUs are as fast in fp32, and it keeps rounding out of the cache
        self.cache_dtype = weights.dtype if weights.device.type != "cpu" else torch.float32
        self._cache: KVCache | None = None
        address = weights.head.weight.data_ptr()

        def run(key: tuple[int, int], embeds: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
            logits, attention = function(weights, self._cache, embeds, lengths, key[1], watch)
            return (logits,) if attention is None else (logits, attention)

        def addresses() -> tuple[int, ...]:
            return (self._cache.keys.data_ptr(), self._cache.values.data_ptr(), address)

        self.runner = GraphRunner(run, disable=disable, addresses=addresses)

    def __call__(self, cache: KVCache, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        self._cache = cache
        rows = embeds.size(0)
        padded = min(padded_rows(rows), cache.keys.size(1))
        if padded != rows:  # rows that nobody reads, at length 0
            embeds = torch.cat([embeds, embeds.new_zeros(padded - rows, embeds.size(1))])
        capacity = bucketed(max(cache.lengths) + 1)
        outputs = self.runner((padded, capacity), embeds, cache.device_lengths[:padded])
        # both belong to the graph and are overwritten by its next replay, when the loop is done with them
        logits, attention = outputs[0][:rows], outputs[1][:rows] if len(outputs) == 2 else None
        return logits, attention


def _together(embeds: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours (R, P, D) that one prefill takes: products of more rows are faster, up to a point."""
    some: list[Tensor] = []
    for one in embeds:
        longest = max(part.size(1) for part in [*some, one])
        if some and (len(some) + 1) * one.size(0) * longest > PREFILL_POSITIONS:
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def padded_rows(rows: int) -> int:
    """Rows for which a graph is captured: 1, 2, 3, 4, 8, 12 and so on."""
    return rows if rows <= 4 else -(-rows // 4) * 4


class StaticBackbone:
    """Given weights, a cache of our own, and a step that may be any of several implementations."""

    def __init__(self, weights: Weights, step: Step):
        self.weights, self._step = weights, step
        self.cache = KVCache(len(weights.layers), weights.heads, weights.head_width, step.cache_dtype, weights.device)

    def begin(self, requests: int, rows: int) -> None:
        self._rows = rows
        self.cache.begin(padded_rows(requests * rows))

    def admit(self, embeds: Sequence[Tensor], limits: Sequence[int]) -> Tensor:
        # all at once: growing would lose captured graphs on CUDA, and hold keys or values twice on a CPU
        self.cache.ensure(max(one.size(1) + limit for one, limit in zip(embeds, limits, strict=True)))
        return torch.cat([self._prefill(some) for some in _together(embeds)])

    def _prefill(self, embeds: Sequence[Tensor]) -> Tensor:
        longest = max(one.size(1) for one in embeds)
        padded = [F.pad(one, (0, 0, 0, longest - one.size(1))) for one in embeds]
        return prefill(
            self.weights, self.cache, torch.cat(padded), [one.size(1) for one in embeds for _ in range(one.size(0))]
        )

    def step(self, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        self.cache.ensure(max(self.cache.lengths) + 1)
        logits, attention = self._step(self.cache, embeds)
        self.cache.advance()
        return logits, None if attention is None else attention[:: self._rows]

    def leave(self, number: int) -> None:
        self.cache.drop(number * self._rows, self._rows)

    def release(self) -> None:
        """Give the cache's memory back."""
        self.cache.release()
