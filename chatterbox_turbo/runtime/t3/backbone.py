"""Backbones for the token loop: upstream's Transformers model, and a static one of this package's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device.attention_kernels import Kernel
from .kv_cache import KVCache, bucketed
from .operations import Watch
from .transformer import decode_step, prefill
from .voice_prefixes import LEAST, VoicePrefix, VoicePrefixes
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

    captured = False

    def __init__(self, model: nn.Module, head: nn.Module, attention_maps: bool = False):
        self.model, self.head = model, head
        self._options = {"output_attentions": True} if attention_maps else {}
        # the old name still works where there is a new one, with a warning at each call
        self._cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._caches: list[Any] = []

    def begin(self, requests: int, rows: int) -> None:
        self._caches, self._rows = [], rows

    def admit(self, embeds: Sequence[Tensor], limits: Sequence[int], voices: Sequence[int] = ()) -> Tensor:
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
    """One position more in every row in use, with a cache of ``cache_dtype``.

    ``captured``: it is to run inside a CUDA graph: it waits for nothing, and no shape depends on values.
    """

    cache_dtype: torch.dtype
    captured: bool

    def __call__(self, cache: KVCache, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """(R, D) to logits (R, V) fp32 and, where heads are watched, attention (R, C) fp32; lengths stay.

        Where it is captured, rows beyond those in use may be among the R; what they give means nothing.
        """


class TorchStep:
    """``transformer.decode_step``.

    Args:
        captured: see ``Step``.
        function: ``decode_step``, with other operations or as a compiler has made it.
    """

    def __init__(self, weights: Weights, watch: Watch = (), captured: bool = False, function: Callable = decode_step):
        # attention kernels on CPUs are as fast in fp32, and it keeps rounding out of the cache
        self.cache_dtype = weights.dtype if weights.device.type != "cpu" else torch.float32
        self.captured = captured
        self._weights, self._watch, self._function = weights, watch, function

    def __call__(self, cache: KVCache, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        lengths = cache.device_lengths[: embeds.size(0)]
        return self._function(self._weights, cache, embeds, lengths, bucketed(max(cache.lengths) + 1), self._watch)


def _together(embeds: Sequence[Tensor], kept: int) -> Iterator[list[Tensor]]:
    """Neighbours (R, P, D) that one prefill takes: products of more rows are faster, up to a point.

    ``kept``: of the first positions, which it does not compute.
    """
    some: list[Tensor] = []
    for one in embeds:
        longest = max(part.size(1) for part in [*some, one]) - kept
        if some and (len(some) + 1) * one.size(0) * longest > PREFILL_POSITIONS:
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def padded(requests: int) -> int:
    """Requests for which a graph is captured: 1, 2, 3, 4, 8, 12 and so on."""
    return requests if requests <= 4 else -(-requests // 4) * 4


class StaticBackbone:
    """Given weights, a cache of our own, and a step that may be any of several implementations.

    Args:
        kernel: of the prefill's attention; ``None``: torch's choice.
        voice_bytes: of keys and values that voices leave, on a CPU; on a GPU a prefill takes milliseconds, and memory
            is dear.
    """

    def __init__(self, weights: Weights, step: Step, kernel: Kernel | None = None, voice_bytes: int = 0):
        self.weights, self._step, self._kernel = weights, step, kernel
        self.voices = VoicePrefixes(voice_bytes if weights.device.type == "cpu" and kernel is None else 0)
        self.cache = KVCache(len(weights.layers), weights.heads, weights.head_width, step.cache_dtype, weights.device)

    @property
    def captured(self) -> bool:
        """Whether ``compute`` is to run inside a CUDA graph."""
        return self._step.captured

    def begin(self, requests: int, rows: int) -> None:
        self._rows = rows
        self.cache.begin((padded(requests) if self.captured else requests) * rows)

    def admit(self, embeds: Sequence[Tensor], limits: Sequence[int], voices: Sequence[int] = ()) -> Tensor:
        # all at once: growing would lose captured graphs on CUDA, and hold keys or values twice on a CPU
        self.cache.ensure(max(one.size(1) + limit for one, limit in zip(embeds, limits, strict=True)))
        kept = [self._kept(one, voice) for one, voice in zip_longest(embeds, voices, fillvalue=0)]
        logits = []
        for positions, alike in groupby(zip(embeds, kept, strict=True), key=itemgetter(1)):
            for some in _together([one for one, _ in alike], positions):
                logits.append(self._prefill(some, positions))
        return torch.cat(logits)

    def _kept(self, embeds: Tensor, voice: int) -> int:
        """Of how many first positions keys and values are kept."""
        # by the length alone, not by what is there: or a request would depend on those before it
        return voice if self.voices.limit and voice >= LEAST and embeds.size(0) == 1 and voice < embeds.size(1) else 0

    def _prefill(self, embeds: Sequence[Tensor], kept: int) -> Tensor:
        before = [self.voices.get(one[:, :kept], self._of_voice) for one in embeds] if kept else []
        embeds = [one[:, kept:] for one in embeds]
        longest = max(one.size(1) for one in embeds)
        alike = [F.pad(one, (0, 0, 0, longest - one.size(1))) for one in embeds]
        lengths = [one.size(1) for one in embeds for _ in range(one.size(0))]
        return prefill(self.weights, self.cache, torch.cat(alike), lengths, self._kernel, before)

    def _of_voice(self, embeds: Tensor) -> VoicePrefix:
        cache, place, length = self.cache, self.cache.rows, embeds.size(1)
        prefill(self.weights, cache, embeds)
        keys, values = (one[:, place, :, :length].clone() for one in (cache.keys, cache.values))
        cache.drop(place, 1)
        return VoicePrefix(embeds.clone(), keys, values)

    def step(self, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        self.cache.ensure(max(self.cache.lengths) + 1)
        result = self.compute(embeds)
        self.advance()
        return result

    def compute(self, embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a step does on the device, of ``shape``; there may be more rows than are in use."""
        logits, attention = self._step(self.cache, embeds)
        self.cache.count(embeds.size(0))
        return logits, None if attention is None else attention[:: self._rows]

    def advance(self) -> None:
        """What a step does on the host."""
        self.cache.advance()

    def shape(self) -> Hashable:
        """What the shapes of the next ``compute`` depend on, rows apart."""
        return bucketed(max(self.cache.lengths) + 1)

    def addresses(self) -> Hashable:
        """Fingerprint of the memory that ``compute`` reads and writes."""
        cache = self.cache
        return cache.keys.data_ptr(), cache.values.data_ptr(), self.weights.head.weight.data_ptr()

    def changed(self) -> list[Tensor]:
        """What ``compute`` changes, apart from positions that the next one with the same lengths writes again."""
        return [self.cache.device_lengths]

    def leave(self, number: int) -> None:
        self.cache.drop(number * self._rows, self._rows)

    def rest(self) -> None:
        """Give the cache's memory back."""
        self.cache.release()

    def release(self) -> None:
        """That, and what is kept of voices."""
        self.rest()
        self.voices.clear()
