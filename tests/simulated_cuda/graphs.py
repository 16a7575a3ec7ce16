"""Graphs of the simulated machine: operations on frozen memory, replayed without any Python of the function."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .machine import CudaGenerator, Machine
from .streams import Stream

_handles = itertools.count(1)
_pools: dict[Any, weakref.WeakSet] = {}  # handle → graphs that share its memory


def pool_handle() -> tuple[int, int]:
    """``torch.cuda.graph_pool_handle``."""
    return (0, next(_handles))


class CUDAGraph:
    """``torch.cuda.CUDAGraph``. ``kernels``, ``by_op``: those of one replay.

    Replaying poisons what other graphs of its pool have put out: they may share memory.
    """

    machine: Machine

    def __init__(self) -> None:
        self.handle, self.stream, self.index = None, None, None
        self.kernels, self.by_op, self.spoiled = 0, Counter(), False
        self._work: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self._fresh: list[Tensor] = []
        self._saved: list[tuple[Any, Any]] = []
        self._ready = self._tried = False
        self._generators: list[CudaGenerator] = []
        self._states: list[Tensor] = []

    def register_generator_state(self, generator: CudaGenerator) -> None:
        self._generators.append(generator)

    def pool(self) -> Any:
        if not self._ready:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture")
        return self.handle

    def reset(self) -> None:
        self._work, self._fresh, self._ready = [], [], False
        _pools.get(self.handle, set()).discard(self)

    def begin(self, handle: Any, stream: Stream) -> None:
        """Record what runs on a stream from now on."""
        machine = self.machine
        if machine.capturing is not None:
            raise RuntimeError("another capture is underway: torch's allocator and generator know of one only")
        self.handle = pool_handle() if handle is None else handle
        if self.handle in _pools and not _pools[self.handle]:
            raise RuntimeError("the pool's last graph is gone: the allocator knows the handle no more")
        _pools.setdefault(self.handle, weakref.WeakSet()).add(self)
        self.stream, self.index = stream, stream.device_index
        self._generators.append(machine.generators[self.index])
        self._states = [generator.get_state() for generator in self._generators]
        for generator in self._generators:
            generator.capturing = self
        machine.capturing, machine.recording_pool = self, self.handle
        machine.count("captures")

    def end(self) -> None:
        """Nothing has run in truth: memory and generators are what they were, and results are poison."""
        machine = self.machine
        machine.capturing = None
        with torch.inference_mode(False), torch.no_grad():
            for storage, content in self._saved:
                storage.copy_(content)
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        self._saved = []
        if self.spoiled:  # torch leaves generator and allocator in capture mode
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        for generator in self._generators:
            generator.capturing = None
        machine.recording_pool = None
        _poison(self._fresh)
        self._ready = True
        machine.graphs.add(self)

    def record(self, call: Callable[[], Any], outputs: list[Tensor], op: str = "", kernels: int = 0) -> None:
        """``call`` computes again, on the same memory, what has gone to ``outputs``."""
        if self._work and not self._tried and self.machine.capture_fails():
            self.spoiled = True
            raise RuntimeError("CUDA error: out of memory (as asked for by the test)")
        self._tried = bool(self._work)
        self._work.append((call, outputs))
        self.own(outputs)
        self.kernels += kernels
        if kernels:
            self.by_op[op] += kernels

    def own(self, outputs: list[Tensor]) -> None:
        """Memory of the graph's pool."""
        self._fresh += outputs

    def protect(self, written: Tensor) -> None:
        """Keep the content of memory that an operation is about to write to, unless it is the graph's own."""
        address = written.untyped_storage().data_ptr()
        if any(one.untyped_storage().data_ptr() == address for one in self._fresh):
            return
        if not any(storage.data_ptr() == address for storage, _ in self._saved):
            storage = written.untyped_storage()
            self._saved.append((storage, storage.clone()))

    def replay(self) -> None:
        if not self._ready:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.machine.count("replays")
        self.machine.count("kernels", 2, "fill_ (seed and offset before a replay)")
        for other in _pools[self.handle]:
            if other is not self:
                _poison(other._fresh)
        with torch.inference_mode(False), torch.no_grad():
            for call, outputs in self._work:
                result = call()
                if outputs:
                    results = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
                    for old, new in zip(outputs, results, strict=True):
                        old.copy_(new)
        self.machine.stream(self.index).clock += 1


def _poison(tensors: list[Tensor]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for one in tensors:
            if one.is_floating_point() or one.is_complex():
                one.fill_(float("nan"))
            elif one.dtype != torch.bool:
                one.fill_(101)


class Capture:
    """``torch.cuda.graph``: what runs in the body is recorded."""

    def __init__(
        self, machine: Machine, cuda_graph: CUDAGraph, pool: Any, stream: Stream, capture_error_mode: str = "global"
    ):
        self._machine, self._graph, self._pool, self._stream = machine, cuda_graph, pool, stream
        self._current: Any = None

    def __enter__(self) -> None:
        self._machine.synchronize()
        self._current = self._machine.on_stream(self._stream)
        self._current.__enter__()
        try:
            self._graph.begin(self._pool, self._stream)
        except BaseException:
            self._current.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._graph.end()
        finally:
            self._current.__exit__(None, None, None)
