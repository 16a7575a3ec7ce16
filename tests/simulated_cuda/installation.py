"""Putting the simulated machine in the place of ``torch.cuda``, and taking it away again."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from chatterbox_turbo.runtime.device import graphs as package_graphs

from .execution import Execution
from .graphs import Capture, CUDAGraph, pool_handle
from .machine import CudaGenerator, Machine
from .tensors import SimulatedTensor

RELEASE = "2.6"


def unsupported() -> str:
    """Why nothing can be simulated here, or an empty string."""
    if not torch.__version__.startswith(f"{RELEASE}."):
        return f"the simulated CUDA machine knows the inside of torch {RELEASE}, this is {torch.__version__}"
    return "a real CUDA device is here" if torch.cuda.is_available() else ""


@contextmanager
def simulated_cuda(
    devices: int = 2,
    current: int = 0,
    capability: tuple[int, int] = (9, 0),
    tf32: bool = False,
    machine: Machine | None = None,
) -> Iterator[Machine]:
    """``torch.cuda`` is a machine with so many alike devices in the body, of which ``current`` is this thread's.

    Without gradients: autograd asks a driver for the streams of a graph's inputs, and ends the process.

    Args:
        tf32: products of matrices and convolutions round as TF32 does, where the switches allow it.
        machine: one of an earlier block, with the tensors that were made there.
    """
    machine = machine or Machine(devices, capability)
    machine.current, machine.tf32 = current, tf32
    execution = Execution(machine)
    real_thread_run = threading.Thread.run

    def run_thread(thread: threading.Thread) -> None:
        with execution, torch.no_grad():  # modes are a thread's own
            real_thread_run(thread)

    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("chatterbox_turbo") and getattr(module, "Generator", None) is torch.Generator
    ]
    patches = [
        *(patch.object(torch.cuda, name, value) for name, value in _functions(machine).items()),
        *(patch.object(module, "Generator", _Generator) for module in (torch, *holders)),
        patch.object(threading.Thread, "run", run_thread),
        patch.object(F, "scaled_dot_product_attention", execution.attention),
        patch.object(torch, "tensor", partial(_tensor, machine, torch.tensor)),
        patch.object(torch, "as_tensor", partial(_as_tensor, machine, torch.as_tensor)),
        patch.object(Tensor, "to", _with_index(machine, Tensor.to)),
        patch.object(
            Tensor,
            "cuda",
            lambda tensor, device=None, non_blocking=False: tensor.to(
                torch.device("cuda", machine.index(device)), non_blocking=non_blocking
            ),
        ),
        patch.object(Tensor, "pin_memory", lambda tensor, *_: execution.pin(tensor.clone())),
        patch.object(Tensor, "is_pinned", lambda tensor, *_: execution.is_pinned(tensor)),
        *(
            patch.object(torch._C, name, partial(_end_recording, machine))
            for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
            if hasattr(torch._C, name)
        ),
        patch.object(SimulatedTensor, "mode", execution),
    ]
    cudnn, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False  # its tests of tensors ask the driver
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # ``Module.to`` puts shells in place
    _forget_streams()
    started = []
    try:
        for one in patches:
            one.start()
            started.append(one)
        with execution, torch.no_grad():
            yield machine
    finally:
        for one in reversed(started):
            one.stop()
        torch.backends.cudnn.enabled = cudnn
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
        _forget_streams()


def _forget_streams() -> None:
    package_graphs._side_stream.cache_clear()
    package_graphs._last_streams.clear()


class _AnyGenerator(type):
    def __instancecheck__(cls, one: Any) -> bool:
        return isinstance(one, cls.__base__)


class _Generator(torch.Generator, metaclass=_AnyGenerator):
    """``torch.Generator`` for the simulated devices as well."""

    def __new__(cls, device: Any = "cpu") -> Any:
        cuda = torch.device(device).type == "cuda"
        return CudaGenerator(device) if cuda else cls.__base__.__new__(cls.__base__, device)


class _Properties:
    name, major, minor, multi_processor_count = "Simulated", 9, 0, 132

    def __init__(self, memory: int):
        self.total_memory = memory


def _functions(machine: Machine) -> dict[str, Any]:
    """What takes the place of ``torch.cuda``'s own."""

    def exchange(index: int) -> int:
        before = machine.current
        if index >= 0:
            machine.current = index
        return before

    def manual_seed_all(seed: int) -> None:
        for generator in machine.generators:
            generator.manual_seed(int(seed) ^ 0x5EED)

    def empty_cache() -> None:
        if machine.recording_pool is not None:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        machine.reserved, machine.emptied = machine.allocated + machine.inactive, machine.emptied + 1

    def reset_peak(device: Any = None) -> None:
        machine.peak = machine.allocated

    def set_sync_debug_mode(mode: int | str) -> None:
        machine.sync_debug_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    return {
        "_lazy_init": lambda: None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "set_device": lambda device: exchange(machine.index(device)),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: machine.devices,
        "current_device": lambda: machine.current,
        "get_device_capability": lambda device=None: machine.capability,
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_properties": lambda device=None: _Properties(machine.memory),
        "mem_get_info": lambda device=None: (machine.free, machine.memory),
        "memory_allocated": lambda device=None: machine.allocated,
        "max_memory_allocated": lambda device=None: machine.peak,
        "memory_reserved": lambda device=None: machine.reserved,
        "memory_stats": lambda device=None: {"inactive_split_bytes.all.current": machine.inactive},
        "memory_stats_as_nested_dict": lambda device=None: {
            "allocated_bytes": {"all": {"current": machine.allocated, "peak": machine.peak}}
        },
        "memory_snapshot": lambda mempool_id=None: machine.segments,
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": empty_cache,
        "synchronize": machine.synchronize,
        "Stream": machine.Stream,
        "Event": machine.Event,
        "stream": machine.on_stream,
        "current_stream": lambda device=None: machine.stream(machine.index(device)),
        "default_stream": lambda device=None: machine.default_streams[machine.index(device)],
        "is_current_stream_capturing": lambda: machine.in_capture(machine.current),
        "graph_pool_handle": pool_handle,
        "CUDAGraph": type("CUDAGraph", (CUDAGraph,), {"machine": machine}),
        "graph": lambda cuda_graph, pool=None, stream=None, capture_error_mode="global": Capture(
            machine, cuda_graph, pool, stream, capture_error_mode
        ),
        "default_generators": tuple(machine.generators),
        "get_rng_state": lambda device="cuda": machine.generators[machine.index(device)].get_state(),
        "set_rng_state": lambda state, device="cuda": machine.generators[machine.index(device)].set_state(
            state.clone()
        ),
        "manual_seed": lambda seed: machine.generators[machine.current].manual_seed(int(seed) ^ 0x5EED),
        "manual_seed_all": manual_seed_all,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: machine.sync_debug_mode,
    }


def _end_recording(machine: Machine, *_: Any) -> None:
    if machine.recording_pool is None:
        raise RuntimeError("not currently recording to this pool")
    machine.recording_pool = None


# torch builds these on the host and copies them; its own guard of the device needs a driver


def _tensor(machine: Machine, real: Any, data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    if isinstance(data, SimulatedTensor):
        machine.wait("torch.tensor of a tensor", data.index)
        data = data.inner
    return _placed(machine, real(data, *args, **kwargs), device)


def _as_tensor(machine: Machine, real: Any, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    if isinstance(data, Tensor):
        return data.to(device=data.device if device is None else device, dtype=dtype or data.dtype)
    return _placed(machine, real(data, dtype=dtype), device)


def _with_index(machine: Machine, real: Any) -> Any:
    def named(one: Any) -> Any:
        is_cuda = isinstance(one, torch.device | str) and torch.device(one).type == "cuda"
        return torch.device("cuda", machine.index(one)) if is_cuda else one

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return real(tensor, *map(named, args), **{key: named(value) for key, value in kwargs.items()})

    return to


def _placed(machine: Machine, tensor: Tensor, device: Any) -> Tensor:
    if device is None or torch.device(device).type != "cuda":
        return tensor if device is None else tensor.to(device)
    return tensor.to(torch.device("cuda", machine.index(device)))
