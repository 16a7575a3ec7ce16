"""CUDA graphs around any callable over static buffers."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import TurboError, describe
from .. import forks
from .captures import capturing
from .tf32 import numerics

Outputs = Tensor | tuple[Tensor, ...]

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """What all runners of the process did for a while. ``failures``: keys without a graph, and why."""

    captures: int = 0
    replays: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


_tallies: list[Tally] = []


@contextmanager
def tallying() -> Iterator[Tally]:
    """Count in the body."""
    tally = Tally()
    _tallies.append(tally)
    try:
        yield tally
    finally:
        _tallies[:] = [one for one in _tallies if one is not tally]


_launching = forks.lock()
_last_streams: dict[torch.device, torch.cuda.Stream] = {}  # where the newest replay of each device went


class GraphCallError(TurboError, ValueError):
    """A call does not fit what a graph can replay: other shapes than those captured, no tensors, no CUDA."""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of warm-up and capture: one a device, as each holds a cuBLAS workspace for the process's life."""
    return torch.cuda.Stream(device)


@dataclass
class _Entry:
    """One key: its inputs' (shape, dtype, device), and graph and static buffers unless it runs eagerly."""

    specs: list[tuple[torch.Size, torch.dtype, torch.device]]
    graph: Any = None
    inputs: tuple[Tensor, ...] = ()
    outputs: Outputs = ()


class GraphRunner:
    """Runs a function as one CUDA graph a key: captured and replayed at its first call, replayed from then on.

    Args:
        function: (key, \\*inputs) → tensor or tuple of tensors. Only CUDA work on the inputs and on static state
            that it closes over (weights, a cache), of shapes that ``key`` decides; no host sync, no random
            numbers. The first call of a key runs it several times on the same inputs, so it is idempotent, apart from
            what ``changes`` names. State that it writes is allocated outside
            of ``torch.inference_mode``.
        disable: call the function directly (CPU, or graphs switched off); all checks stay.
        addresses: fingerprint of the static state (``data_ptr`` and dtype of weights and cache), taken before
            each call; when it changes, all graphs are dropped.
        device: where it runs, if it is called without inputs.
        changes: static tensors that the function changes otherwise than by writing to positions that are inputs. They
            are put back after the runs before a capture, so that a first call counts once.
        max_graphs: the least recently used graph beyond this number is dropped; at least 1.
        warmup: runs before a capture, at least 1: libraries and compilers initialize themselves there.
        pool: the graphs to share memory with: one set for several runners, never two of them at work at once.

    Attributes:
        fallbacks: key → why it runs eagerly until ``reset``: out of memory, or a ``RuntimeError`` while capturing,
            after which the function succeeded without a graph.
        reset: drops graphs, static buffers and fallbacks, without a reference to the function: with
            ``weakref.finalize(model, runner.reset)`` the model can die. ``torch.cuda.empty_cache()`` then gives
            the memory back to the driver.

    Functions that are bound methods are held weakly: their object owns the runner, and takes its graphs along when it
    goes, without waiting for the garbage collector. Graphs are captured anew where TF32 or deterministic algorithms
    are switched.

    It has no lock: the caller holds its own, on any thread. Replays of one device on several streams run one after
    the other. What other threads may not do during a capture: ``captures``.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        *,
        disable: bool,
        addresses: Callable[[], Hashable] = lambda: (),
        max_graphs: int = 16,
        warmup: int = 2,
        pool: weakref.WeakSet | None = None,
        device: torch.device | None = None,
        changes: Callable[[], Sequence[Tensor]] = tuple,
    ):
        if max_graphs < 1 or warmup < 1:
            raise ValueError(f"max_graphs and warmup are at least 1, not {max_graphs} and {warmup}.")
        self._function, self._disable, self._addresses = _held(function), disable, _held(addresses)
        self._max_graphs, self._warmup = max_graphs, warmup
        self._device, self._changes = device, _held(changes)
        self._pool = weakref.WeakSet() if pool is None else pool
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._fingerprint: Hashable = None
        self.fallbacks: dict[Hashable, str] = {}
        self.reset = functools.partial(_clear, self._entries, self.fallbacks)

    @property
    def captured(self) -> list[Hashable]:
        """Keys that hold a graph (if disabled: that would), least recently used first."""
        return [key for key in self._entries if key not in self.fallbacks]

    def __call__(self, key: Hashable, *inputs: Tensor) -> Outputs:
        """Outputs of the function for ``inputs``, all on one device; at least one where the runner has no device.

        They are static buffers: the next call of this runner, whatever its key, or of another one on the same pool
        overwrites them. Clone what has to outlive it.

        Raises:
            GraphCallError: an input is no tensor, or of another shape, dtype or device than at the first call
                of ``key``; the function returns something else than tensors; graphs are on without CUDA.
        """
        specs = _specs(inputs, self._disable, self._device)
        device = inputs[0].device if inputs else self._device
        # ordinary buffers can be written inside and outside of inference mode, inference buffers only inside
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            fingerprint = (self._addresses()(), numerics())
            if fingerprint != self._fingerprint:
                self._entries.clear()
                self._fingerprint = fingerprint
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(specs)
                reason = "" if key in self.fallbacks else self._make_graph(entry, key, inputs, device)
                if entry.graph is None:
                    outputs = self._run(key, inputs)
                    if reason:
                        self.fallbacks[key] = reason
                        logger.warning("%r runs without a CUDA graph: %s", key, reason)
                        for tally in _tallies:
                            tally.failures.append((repr(key), reason))
                self._entries[key] = entry  # only now: nothing of a call that raised is kept
                if entry.graph is None:
                    return outputs
            _compare(key, entry.specs, specs)
            self._entries.move_to_end(key)
            if entry.graph is None:
                return self._run(key, inputs)
            for static, given in zip(entry.inputs, inputs, strict=True):
                static.copy_(given)
            _launch(entry.graph, device)
            return entry.outputs  # aliases the pool

    def _run(self, key: Hashable, inputs: tuple) -> Outputs:
        outputs = self._function()(key, *inputs)
        for index, one in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
            if not isinstance(one, Tensor):
                what, why = f"Output {index} is {type(one).__name__}, not a tensor.", "A replay would freeze its value."
                raise GraphCallError(what, why, "Let the function return a tensor or a tuple of tensors.")
        return outputs

    def _make_graph(self, entry: _Entry, key: Hashable, inputs: tuple, device: torch.device) -> str:
        """Fill ``entry`` with a graph and its buffers, or return the reason why that is impossible."""
        while len(self.captured) >= self._max_graphs:  # before the capture, which reuses the memory
            del self._entries[self.captured[0]]
        graph, reason = None, ""
        if self._disable:
            return reason
        with capturing():
            stream, current = _side_stream(device), torch.cuda.current_stream(device)
            try:
                static = tuple(torch.empty_like(one).copy_(one) for one in inputs)
                kept = [(one, one.clone()) for one in self._changes()()]
                stream.wait_stream(current)
                try:
                    with torch.cuda.stream(stream):
                        for _ in range(self._warmup):
                            self._run(key, static)
                finally:
                    current.wait_stream(stream)
                    for one, before in kept:
                        one.copy_(before)
                # the allocator refuses a handle whose last graph is gone
                handle = next((one.pool() for one in self._pool), None) or torch.cuda.graph_pool_handle()
                graph = torch.cuda.CUDAGraph()
                # the outer scope gives the caller's stream back even if the capture cannot be ended
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(graph, pool=handle, stream=stream, capture_error_mode="thread_local"),
                ):
                    try:
                        entry.outputs = self._run(key, static)
                    except RuntimeError as error:
                        reason = describe(error)  # ending the broken capture raises something vaguer
                        raise
            except BaseException as error:
                if graph is not None:
                    self._pool.clear()  # live graphs keep their memory, but it may count as being recorded to
                    _unwind(graph, handle, stream)
                if not isinstance(error, torch.OutOfMemoryError if graph is None else RuntimeError):
                    raise
                reason = reason or describe(error)
            if reason:  # the error and its frames are gone, and with them what they held
                static = entry.outputs = ()
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
            else:
                self._pool.add(graph)
                entry.graph, entry.inputs = graph, static
                for tally in _tallies:
                    tally.captures += 1
        return reason


def _launch(graph: Any, device: torch.device) -> None:
    """Replay on the current stream, behind the newest replay of the device on any other.

    All graphs of a device use the cuBLAS workspace of the stream that they were captured on.
    """
    with _launching:
        stream = torch.cuda.current_stream(device)
        last = _last_streams.get(device)
        if last is not None and last != stream:
            stream.wait_stream(last)
        _last_streams[device] = stream
        graph.replay()
    for tally in _tallies:
        tally.replays += 1


def _unwind(graph: Any, handle: Any, stream: torch.cuda.Stream) -> None:
    """Undo what a failed capture leaves behind in torch."""
    graph.reset()
    # without pytorch's pull request 180395 the allocator goes on recording, and its empty_cache asserts
    old, new = "_cuda_endAllocateCurrentStreamToPool", "_cuda_endAllocateToPool"
    with suppress(RuntimeError):  # "not currently recording": nothing was left behind
        getattr(torch._C, new if hasattr(torch._C, new) else old)(stream.device.index, handle)
    # and the default generator raises at every random number, until a capture comes to its end
    healing = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local")
    with suppress(RuntimeError), torch.cuda.stream(stream), healing:
        torch.zeros(1, device=stream.device)


def _held(function: Callable) -> Callable[[], Callable]:
    return weakref.WeakMethod(function) if inspect.ismethod(function) else lambda: function


def _clear(*held: dict) -> None:
    for one in held:
        one.clear()


def _specs(inputs: tuple, disable: bool, device: torch.device | None) -> list:
    """(shape, dtype, device) of every input, if a graph can take them."""
    if not inputs and device is not None:
        return []
    if not inputs:
        raise GraphCallError("A graph needs at least one input tensor.", "Its device is the graph's.")
    for index, one in enumerate(inputs):
        if not isinstance(one, Tensor):
            what, why = f"Input {index} is {type(one).__name__}, not a tensor.", "A graph freezes any other value."
            raise GraphCallError(what, why, "Make it a tensor on the graph's device, or a part of the key.")
        if one.device != inputs[0].device:
            what = f"Input {index} is on {one.device}, input 0 on {inputs[0].device}."
            raise GraphCallError(what, "", f"Move it to {inputs[0].device} first.")
    if not disable and inputs[0].device.type != "cuda":
        what = f"Graphs are captured on CUDA only, and input 0 is on {inputs[0].device}."
        raise GraphCallError(what, "", "Pass disable=True.")
    return [(one.shape, one.dtype, one.device) for one in inputs]


def _compare(key: Hashable, first: list, now: list) -> None:
    if len(now) != len(first):
        raise GraphCallError(f"Key {key!r} was first called with {len(first)} inputs, now with {len(now)}.")
    for index, (before, after) in enumerate(zip(first, now, strict=True)):
        if before != after:
            what, why = (f"{tuple(shape)}, {dtype}, {device}." for shape, dtype, device in (after, before))
            remedy = "Use another key for other shapes, or pad and cast the input."
            raise GraphCallError(f"Input {index} of key {key!r} is {what}", f"At its first call it was {why}", remedy)
