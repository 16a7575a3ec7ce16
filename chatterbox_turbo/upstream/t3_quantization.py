"""Quantized layers in place of T3's own, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..patching import Journal
from ..runtime.device.quantized import SCHEMES, Multiply, QuantizedLinear, QuantizedMatrix, Scheme
from ..runtime.device.rounding import forms, quantize
from ..runtime.memory import clearing
from ..runtime.quantization import Backend
from .t3_weights import Site, final_norm

FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def schemes(t3: Any, journal: Journal | None = None) -> list[str]:
    """Schemes of the quantized layers in a T3, whatever it is or looks like, that ``journal`` has not put there."""
    found = set()
    for owner in t3.modules() if isinstance(t3, nn.Module) else ():
        for name, layer in owner.named_children():
            if isinstance(layer, QuantizedLinear) and not (journal and journal.owns(owner, name)):
                found.add(layer.scheme)
    return sorted(found)


def why_not(t3: nn.Module, scheme: str, chosen: Sequence[Sequence[Site]], journal: Journal) -> str:
    """Why these layers cannot be had in a scheme; empty where they can.

    Those that ``journal`` has put there do not count, and those that have the scheme already stay as they are.
    """
    found = schemes(t3, journal)
    if set(found) - {scheme}:
        return f"T3 is quantized already ({', '.join(found)})"
    if not chosen:
        return 'the strategy leaves every layer of a model as small as this one: "aggressive" leaves none'
    for sites in chosen:
        for owner, name in sites:
            inputs, dtype = _inputs(getattr(owner, name))
            if inputs % SCHEMES[scheme].multiple:
                return f"{name} has {inputs} inputs, and {scheme} needs a multiple of {SCHEMES[scheme].multiple}"
            if dtype not in FORMATS:
                return f"{name} is {dtype}"
    return ""


@dataclass
class _Original:
    """A layer that is outside of T3 for as long as another one is in its place."""

    owner: nn.Module
    name: str
    layer: nn.Module
    instead: QuantizedLinear

    def come_back(self, dtype: torch.dtype | None) -> None:
        """Be where the other one is now; in a format, where T3 has been cast to that meanwhile."""
        _move(self.layer, self.instead.codes.device, dtype)
        self.layer.bias = self.instead.bias


class Replaced:
    """Quantized layers in place of others, which are kept on the host until ``forget``.

    Coming back, those have the format and the device that the app has given T3 meanwhile, as if they had never been
    away.

    Attributes:
        before, after: bytes of the weights, and of the codes, scales and zeros in their place.
    """

    def __init__(self, t3: nn.Module, journal: Journal):
        self._journal = journal
        self._originals: list[_Original] = []
        # casts of T3 reach it, and this package casts it nowhere
        self._companion = final_norm(t3)
        self._companion_was = self._companion.weight.dtype
        self.before = self.after = 0
        journal.record("original weights of T3 on the host", self._back)

    @property
    def nbytes(self) -> int:
        """Bytes on the host that the original weights take."""
        return self.before if self._originals else 0

    def add(self, owner: nn.Module, name: str, scheme: Scheme, backend: Backend, fit: bool) -> None:
        """Replace one more; one that has the scheme already stays, with another back end."""
        old = getattr(owner, name)
        if isinstance(old, QuantizedLinear) and old.scheme == scheme.name:
            self._journal.set(old, "by", backend.multiply)
            return
        weight = weight_of(old)
        matrix = quantize(weight, scheme.name, fit)
        self.before, self.after = self.before + weight.nbytes, self.after + matrix.nbytes
        new = QuantizedLinear(matrix, backend.multiply, old.bias)
        new.train(old.training)
        self._journal.set(owner, name, new)
        self._originals.append(_Original(owner, name, old, new))
        _move(old, torch.device("cpu"))

    def forget(self) -> None:
        """Let the old layers go: the quantized ones stay, whatever is undone."""
        for original in self._originals:
            self._journal.keep(original.owner, original.name)
        self._originals = []
        clearing.replaced()

    def _back(self) -> None:
        now = self._companion.weight.dtype
        cast_since = now != self._companion_was and now.is_floating_point
        for original in self._originals:
            original.come_back(now if cast_since else None)


def replace_layers(
    t3: nn.Module, chosen: Sequence[Sequence[Site]], scheme: Scheme, backend: Backend, fit: bool, journal: Journal
) -> Replaced:
    """Quantize the weights of these layers; undoing puts the layers back."""
    replaced = Replaced(t3, journal)
    for number, sites in enumerate(chosen):
        for owner, name in sites:
            replaced.add(owner, name, scheme, backend, fit)
        clearing.replaced(number)
    clearing.replaced()
    return replaced


def names(t3: nn.Module, chosen: Sequence[Sequence[Site]]) -> list[str]:
    """Dotted names of layers, in T3."""
    paths = {id(module): path for path, module in t3.named_modules()}
    return [f"{paths[id(owner)]}.{name}" for sites in chosen for owner, name in sites]


def put_empty_layers(t3: nn.Module, layers: Sequence[str], scheme: str, by: Multiply) -> None:
    """Quantized layers that await their values (on the meta device), in the place of a new T3's layers of these names.

    Raises:
        AttributeError: T3 has no such layer.
        ValueError: it does not fit the scheme.
    """
    for path in layers:
        owner, _, name = path.rpartition(".")
        parent = t3.get_submodule(owner)
        old = parent.get_submodule(name)
        rows, columns = weight_of(old).shape
        tensors = [torch.empty(rows, each, dtype=dtype, device="meta") for dtype, each in forms(scheme, columns)]
        setattr(parent, name, QuantizedLinear(QuantizedMatrix(scheme, *tensors), by, old.bias))


def _inputs(layer: nn.Module) -> tuple[int, torch.dtype]:
    """How many, and the format of their weights."""
    if isinstance(layer, QuantizedLinear):
        return layer.in_features, torch.float32
    return weight_of(layer).size(1), layer.weight.dtype


def weight_of(layer: nn.Module) -> torch.Tensor:
    """(out, in); GPT-2's layers keep theirs as (in, out)."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()


def _move(layer: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    if (layer.weight.device, layer.weight.dtype) == (device, dtype or layer.weight.dtype):
        return
    bias, layer.bias = layer.bias, None  # the quantized layer has the same one
    try:
        layer.to(device, dtype)
    finally:
        layer.bias = bias
