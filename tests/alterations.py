"""Ways in which apps alter a layer so that it computes something else than its weights tell."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def reach(model, path):
    """What holds the part at a dotted path, and its name there."""
    *way, name = path.split(".")
    owner = model
    for step in way:
        owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
    return owner, name


def _forward_replaced(layer):
    own = layer.forward
    layer.forward = lambda *args, **kwargs: 3.0 * own(*args, **kwargs).flip(-1)
    return lambda: delattr(layer, "forward")


def _hooked(layer):
    return layer.register_forward_hook(lambda module, args, output: 3.0 * output.flip(-1)).remove


def _softened(layer):
    """Of a head: other logits whose largest stays the largest, so that speech ends where it ended."""
    return layer.register_forward_hook(lambda module, args, output: 0.5 * output).remove


def _parametrized(layer):
    class Scaled(nn.Module):
        def forward(self, weight):
            return 3.0 * weight.flip(0)

    parametrize.register_parametrization(layer, "weight", Scaled())
    return lambda: parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


class _Adapter(nn.Module):
    """As PEFT's: shows the base layer's weight and adds to its result."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, *args):
        return 3.0 * self.base_layer(*args).flip(-1)


class _Opaque(nn.Module):
    """A wrapper without a weight."""

    def __init__(self, base):
        super().__init__()
        self.inner = base

    def forward(self, *args):
        return 3.0 * self.inner(*args).flip(-1)


ALTERATIONS = {"forward": _forward_replaced, "hook": _hooked, "parametrization": _parametrized}
WRAPPERS = {"adapter": _Adapter, "opaque": _Opaque}


def alter(model, path, how):
    """Alter the layer at a path; what takes it back."""
    owner, name = reach(model, path)
    layer = owner[int(name)] if name.isdigit() else getattr(owner, name)
    if how == "softened":
        return _softened(layer)
    if how in ALTERATIONS:
        return ALTERATIONS[how](layer)
    setattr(owner, name, WRAPPERS[how](layer))
    return lambda: setattr(owner, name, layer)
