"""Operations of the simulated machine: checked, recorded, and computed on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .attention import OPERATORS, on_host
from .machine import Machine
from .streams import GARBAGE
from .tensors import SimulatedTensor

aten = torch.ops.aten

RANDOM = frozenset({
    "bernoulli", "bernoulli_", "exponential_", "multinomial", "normal", "normal_", "rand", "rand_like", "randint",
    "randn", "randn_like", "random_", "randperm", "uniform_",
})  # fmt: skip
WITHOUT_KERNEL = frozenset({
    "_reshape_alias", "_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided", "lift", "lift_fresh",
    "new_empty", "new_empty_strided", "resize_",
})  # fmt: skip
ALLOCATING = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
KERNELS = {"sort": 4, "topk": 4, "cumsum": 2}  # of one call; all others: one
WAITING = frozenset({
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave",
    "unique_dim",
})  # fmt: skip
INDEXED = frozenset({"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"})
STRICT = frozenset({"addmm", "bmm", "cat", "embedding", "gather", "index_select", "mm", "scatter_", "stack"})
MULTIPLIED = {"convolution": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


class Execution(TorchDispatchMode):
    """Runs every operation with a simulated tensor or a simulated device's name in it."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One operation."""
        name = func._schema.name.split("::")[1]
        args, kwargs = tree_map(lambda x: x.inner if _is_on_host(x) else x, (args, kwargs))
        leaves = tree_leaves((args, kwargs))
        simulated = [one for one in leaves if isinstance(one, SimulatedTensor)]
        device = kwargs.get("device")
        target = self.machine.index(device) if device is not None and torch.device(device).type == "cuda" else None
        named = any(isinstance(one, torch.device) and one.type == "cuda" for one in leaves)
        if not simulated and not named and target is None:
            return self._on_host(func, args, kwargs)
        if name == "lstm":  # cuDNN's single call; its decomposition has another shape
            return self._launch(func, "lstm", args, kwargs, simulated[0].index)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        plain = [one for one in leaves if isinstance(one, Tensor) and not isinstance(one, SimulatedTensor)]
        if name in ("copy_", "_to_copy") and (plain or (device is not None and target is None)):
            return self._between(name, func, args, kwargs, target)
        indexes = {one.index for one in simulated}
        if len(indexes) > 1 and name not in ("copy_", "_to_copy"):
            found = ", ".join(f"cuda:{index}" for index in sorted(indexes))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} ({name})")
        index = target if target is not None else simulated[0].index
        if indexes - {index} or (name == "copy_" and len(indexes) > 1):
            self.machine.note("between_devices", f"{name} {tuple(simulated[0].shape)}")
        self._check_operands(name, args, plain, index)
        if name in WAITING or (name in INDEXED and any(_is_simulated_mask(one) for one in tree_leaves(args[1]))):
            self.machine.wait(name, index)
        if name in RANDOM:
            func, args, kwargs = self._with_generator(func, name, args, kwargs, index)
        pinned = kwargs.get("pin_memory") and target is None and device is not None
        kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "device")}
        if device is not None and any(a.name == "device" for a in func._schema.arguments):
            kwargs["device"] = torch.device("cpu")
        result_index = index if device is None or target is not None else None
        result = self._launch(func, name, args, kwargs, result_index)
        return self.pin(result, GARBAGE) if pinned else result

    def attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        """``F.scaled_dot_product_attention`` as CUDA's efficient kernel: what it refuses and how many it launches."""
        if not isinstance(query, SimulatedTensor):
            return on_host(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        operands = [one for one in (query, key, value, attn_mask) if one is not None]
        if not all(isinstance(one, SimulatedTensor) and one.index == query.index for one in operands):
            raise RuntimeError("Expected all tensors to be on the same device (attention)")
        if not query.dtype == key.dtype == value.dtype:
            raise RuntimeError("Expected query, key, and value to have the same dtype")
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
            raise RuntimeError("Expected attn_mask dtype to be bool or to match query dtype")
        kernels = 1
        if attn_mask is not None:  # a mask of bools becomes one of numbers; rows are padded to multiples of eight
            kernels += 3 * (attn_mask.dtype == torch.bool) + (attn_mask.size(-1) % 8 != 0)

        def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            result = on_host(q, k, v, mask, is_causal=is_causal, scale=scale)
            return result.transpose(1, 2).contiguous().transpose(1, 2)

        args = (query, key, value, attn_mask)
        return self._launch(None, "attention", args, {}, query.index, compute, kernels)

    def _on_host(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        pinned = kwargs.get("pin_memory")
        result = func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
        return self.pin(result, GARBAGE) if pinned else result

    def pin(self, tensor: Tensor, value: float | None = None) -> Tensor:
        """Count memory as pinned, filled with a value."""
        if value is not None:
            tensor.fill_(True if tensor.dtype in (torch.bool, torch.uint8) else value)
        self.machine.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.machine.pinned

    # ---- between host and device

    def _between(self, name: str, func: Any, args: tuple, kwargs: dict[str, Any], target: int | None) -> Any:
        if name == "copy_":
            destination, source = args[:2]
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if isinstance(destination, SimulatedTensor):
                self._upload(destination.inner, source, non_blocking)
            else:
                self._download(destination, source, non_blocking)
            return destination
        source = args[0]
        options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
        with torch.inference_mode(False), torch.no_grad():
            inner = source.inner if isinstance(source, SimulatedTensor) else source
            made = torch.empty_like(func(inner, **options))
        if isinstance(source, SimulatedTensor):
            if kwargs.get("non_blocking"):
                self.pin(made)
            self._download(made, source, kwargs.get("non_blocking", False))
            return made.clone() if torch.is_inference_mode_enabled() and not self.is_pinned(made) else made
        if self.machine.in_capture(target):
            self.machine.capturing.own([made])
        self._upload(made, source, kwargs.get("non_blocking", False))
        return SimulatedTensor(made, target)

    def _upload(self, destination: Tensor, source: Tensor, non_blocking: bool) -> None:
        machine, what = self.machine, f"{tuple(source.shape)} {source.dtype}"

        def copy() -> None:
            with torch.inference_mode(False), torch.no_grad():
                destination.copy_(source)

        if non_blocking and self.is_pinned(source):
            machine.note("upload", what)
        else:
            machine.wait(what, kind="host_to_device")
        if machine.in_capture():
            machine.capturing.protect(destination)
            machine.capturing.record(copy, [])
        copy()

    def _download(self, destination: Tensor, source: SimulatedTensor, non_blocking: bool) -> None:
        machine, what = self.machine, f"{tuple(source.shape)} {source.dtype}"
        if not (non_blocking and self.is_pinned(destination)):
            machine.wait(f"copy to the host, {what}", source.index)
            with torch.inference_mode(False), torch.no_grad():
                destination.copy_(source.inner)
            return
        machine.note("download", what)
        if machine.in_capture(source.index):
            index = source.index
            machine.capturing.record(lambda: machine.stream(index).download(destination, source.inner.clone()), [])
        else:
            machine.stream(source.index).download(destination, source.inner.clone())

    # ---- on the device

    def _check_operands(self, name: str, args: tuple, plain: list[Tensor], index: int) -> None:
        """Tensors on the host: numbers (0-dim) are welcome in most operations, indexes are copied, others refused."""
        larger = [one for one in plain if one.dim() > 0]
        if name in INDEXED and larger and isinstance(args[0], SimulatedTensor):
            self.machine.wait(f"{name} with indexes on the host", index, kind="host_to_device")
            larger = []
        if larger or (plain and name in STRICT):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:{index} and cpu! "
                f"({name})"
            )
        if plain and name == "where":
            self.machine.wait("where with a number on the host", index, kind="host_to_device")

    def _with_generator(self, func: Any, name: str, args: tuple, kwargs: dict, index: int) -> tuple[Any, tuple, dict]:
        generator = self.machine.generator_for(kwargs.get("generator"), index)
        if name in ("randn_like", "rand_like"):
            shape, dtype = list(args[0].shape), kwargs.get("dtype") or args[0].dtype
            made = aten.randn.generator if name == "randn_like" else aten.rand.generator
            return made, (shape,), {"generator": generator, "dtype": dtype}
        if not any(one.name == "generator" for one in func._schema.arguments):
            overload = func._schema.overload_name
            func = getattr(getattr(aten, name), f"{overload}_generator" if overload else "generator")
        return func, args, {**kwargs, "generator": generator}

    def _launch(
        self, func: Any, name: str, args: tuple, kwargs: dict[str, Any], index: int | None,
        compute: Callable | None = None, kernels: int | None = None,
    ) -> Any:  # fmt: skip
        machine = self.machine
        kernels = _kernels(func, name) if kernels is None else kernels
        compute = compute or _on_cpu(func, name, machine.tf32)
        written = _written(func, args, kwargs)
        inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, SimulatedTensor) else x, (args, kwargs))
        captured = machine.in_capture(index)
        if captured:
            for one in written:
                machine.capturing.protect(one.inner)
        elif kernels:
            machine.count("kernels", kernels, name)
            machine.count(f"kernels on cuda:{index}", kernels)
            machine.stream(machine.current if index is None else index).clock += 1
        with torch.inference_mode(False), torch.no_grad():
            result = compute(*inner_args, **inner_kwargs)
        if captured:
            self._record(func, name, functools.partial(compute, *inner_args, **inner_kwargs), result, written, kernels)
        if written:
            for one in written:
                if one.shape != one.inner.shape or one.stride() != one.inner.stride():
                    one.refresh()
            returned = len(func._schema.returns)
            return None if returned == 0 else written[0] if returned == 1 else tuple(written)

        def wrap(x: Any) -> Any:
            return SimulatedTensor(x, index) if isinstance(x, Tensor) and index is not None else x

        base = next((x for x in args if isinstance(x, SimulatedTensor)), None)
        of_ordinary = func is not None and func.is_view and base is not None and not base.is_inference()
        if of_ordinary and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary one
                return tree_map(wrap, result)
        return tree_map(wrap, result)

    def _record(self, func: Any, name: str, call: Callable, result: Any, written: list, kernels: int) -> None:
        graph, outputs = self.machine.capturing, [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        if written:
            graph.record(call, [], name, kernels)
        elif name in ALLOCATING:
            graph.own(outputs)
        elif func is None or not (func.is_view or name in WITHOUT_KERNEL):
            graph.record(call, outputs, name, kernels)


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_on_host(one: Any) -> bool:
    return isinstance(one, SimulatedTensor) and one.index is None


def _is_simulated_mask(one: Any) -> bool:
    return isinstance(one, SimulatedTensor) and one.dtype in (torch.bool, torch.uint8)


def _kernels(func: Any, name: str) -> int:
    return 0 if name in WITHOUT_KERNEL or func.is_view else KERNELS.get(name, 1)


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[SimulatedTensor]:
    if func is None:
        return []
    found = []
    for position, one in enumerate(func._schema.arguments):
        if one.alias_info is not None and one.alias_info.is_write:
            found.append(kwargs[one.name] if one.name in kwargs else args[position])
    return [one for one in tree_leaves(found) if isinstance(one, SimulatedTensor)]


def _on_cpu(func: Any, name: str, tf32: bool) -> Callable:
    """The same on the CPU; rounded as TF32 rounds where that is simulated and switched on."""
    if name == "_thnn_fused_lstm_cell":
        return _lstm_cell
    if name in OPERATORS:
        return OPERATORS[name]
    switch = torch.backends.cudnn if name == "convolution" else torch.backends.cuda.matmul
    if not tf32 or name not in MULTIPLIED or not switch.allow_tf32:
        return func
    rounded = MULTIPLIED[name]
    return lambda *args, **kwargs: func(*[_tf32(a) if i in rounded else a for i, a in enumerate(args)], **kwargs)


def _tf32(x: Tensor) -> Tensor:
    """Mantissas of 10 bits."""
    return (
        ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x
    )


def _lstm_cell(inputs: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    gates = inputs + hidden
    for bias in biases:
        gates = gates if bias is None else gates + bias
    i, f, c, o = gates.chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * c.tanh()
    return o.sigmoid() * cell.tanh(), cell, gates
