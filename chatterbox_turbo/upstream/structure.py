"""What a model is made of and which code runs on it: a layer that is not the plain thing, a part that is replaced.

A pass that reads weights and computes by itself what upstream's layers do is right only where each layer on its way
is what it looks like: of a class that the pass knows, with that class's ``forward``, and without hooks or
parametrizations. ``why_not_plain`` says so before a pass is applied. ``Structure`` notices, cheaply before each call,
that this has changed since.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from operator import is_not
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..patching import Journal
from .families import Parts
from .patch_points import owner_of, patch_points
from .watermarker import observed, why_not_perth

# Packages whose layers the passes know; an adapter's or a quantizer's classes live elsewhere.
_HOMES = (
    "torch.nn.",
    "transformers.",
    "chatterbox.",
    "diffusers.",
    "s3tokenizer.",
    "chatterbox_turbo.runtime.device.quantized",
)
# Hooks that look on: Transformers' collect outputs, the multilingual analyzer's attention maps, this package's times.
_ONLOOKERS = ("transformers.", "chatterbox.", "chatterbox_turbo.")
# What passes compute from weights; all else runs as a module, with whatever is hung on it.
_COMPUTED = (
    "t3.tfmr",
    "t3.speech_head",
    "t3.speech_emb",
    "t3.speech_pos_emb",
    "s3gen.flow.encoder",
    "s3gen.flow.decoder.estimator",
    "s3gen.mel2wav",
)
_RENEWED = "patched_model"  # T3.inference makes one of the same layers at every call
_MISSING = object()


def why_not_plain(root: nn.Module, path: str, journal: Journal | None = None, parametrizations: bool = False) -> str:
    """The first layer under ``root`` whose result its class and weights do not tell; empty where there is none.

    Args:
        path: of the root, for the message.
        journal: tells this package's own patches from others'.
        parametrizations: allow them; who calls tells them apart by itself.
    """
    for name, module in _walk(root, path):
        reason = _peculiarity(module, journal, parametrizations)
        if reason:
            return f"{name} {reason}"
    return ""


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in _children(module).items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}")


def _children(module: nn.Module) -> dict[str, nn.Module | None]:
    children = vars(module)["_modules"]
    return {name: child for name, child in children.items() if name != _RENEWED} if _RENEWED in children else children


def _peculiarity(module: nn.Module, journal: Journal | None, parametrizations: bool) -> str:
    cls = type(module)
    if parametrize.is_parametrized(module):
        if not parametrizations:
            return f"has a parametrization of its {', '.join(module.parametrizations)}"
        cls = cls.__bases__[0]  # torch makes a class for each parametrized module
    if not cls.__module__.startswith(_HOMES) or getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls:
        return f"is a {cls.__module__}.{cls.__qualname__}"
    home = getattr(cls.forward, "__module__", None) or ""
    if not home.startswith(_HOMES):
        return f"has a class whose forward comes from {home or 'elsewhere'}"
    own = vars(module)
    if "forward" in own and not (journal is not None and journal.owns(module, "forward")):
        return "has a forward of its own"
    if _hooks(module):
        return "has a forward hook"
    if own.get("lora_layer") is not None:  # of diffusers' linear layers
        return "has a LoRA layer"
    if module.training and isinstance(module, nn.Dropout) and module.p > 0.0:
        return "drops values out: the model is in training mode"
    return ""


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Forward hooks that may change something, before or after."""
    own = vars(module)
    if not own["_forward_hooks"] and not own["_forward_pre_hooks"]:
        return ()
    every = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
    return tuple(hook for hook in every if not (getattr(hook, "__module__", None) or "").startswith(_ONLOOKERS))


@dataclass
class _Seen:
    """A module as it was: its class and children, where and in which format its weight is.

    Where passes compute what it does (``computed``), its hooks and its own forward as well.
    """

    path: str
    module: nn.Module
    kind: type
    children: dict[str, nn.Module | None]
    computed: bool
    hooks: tuple[Any, ...]
    forward: Any
    weight: tuple[Any, Any] | None
    moves: bool


class Structure:
    """The objects and functions of a model as they are now, with whatever this package has put among them.

    Args:
        parts: the model.
        journal: what it has put there.
        names: (namespace, name) pairs of functions and classes that passes reproduce and that no attribute leads to.
        movable: ids of tensors that this package moves between devices itself.
    """

    def __init__(
        self,
        parts: Parts,
        journal: Journal,
        names: Sequence[tuple[Any, str]] = (),
        movable: Set[int] = frozenset(),
    ):
        self._model = model = parts.model
        self._attributes = [(model, name, getattr(model, name, None)) for name in ("t3", "s3gen", "ve")]
        self._watermarker = observed(parts.watermarker)
        roots = {"t3": parts.t3, "s3gen": parts.s3gen, "ve": parts.voice_encoder}
        trees = [_walk(root, name) for name, root in roots.items() if root is not None]
        self._modules = [_seen(path, module, movable) for tree in trees for path, module in tree]
        kinds = {seen.kind for seen in self._modules}
        self._functions = [(cls, "forward", inspect.getattr_static(cls, "forward", _MISSING)) for cls in kinds]
        self._methods: list[tuple[Any, str, str, Any]] = []
        for path in patch_points(parts.family):
            try:
                owner, name = owner_of(parts, path)
            except AttributeError:
                continue  # a release without it
            self._functions.append((type(owner), name, inspect.getattr_static(type(owner), name, _MISSING)))
            if not journal.owns(owner, name):  # where this package has patched an object, others may go on top
                self._methods.append((owner, name, path, vars(owner).get(name)))
        self._names = [(space, name, _value(space, name)) for space, name in names]

    def change(self) -> str:
        """What has been replaced, hooked or patched since; empty where nothing has."""
        for owner, name, value in self._attributes:
            if getattr(owner, name, None) is not value:
                return f"{name} was replaced"
        new = observed(getattr(self._model, "watermarker", None))
        # what marks nothing is the guard's business, which goes on with the one that does
        if new is not self._watermarker and not why_not_perth(new):
            return "watermarker was replaced"
        for seen in self._modules:
            if (what := _changed(seen)) is not None:
                return f"{seen.path} {what}"
        for cls, name, function in self._functions:
            if inspect.getattr_static(cls, name, _MISSING) is not function:
                return f"{cls.__name__}.{name} was patched"
        for owner, name, path, method in self._methods:
            if vars(owner).get(name) is not method:
                return f"{path} was patched, or is no more"
        for space, name, value in self._names:
            if _value(space, name) is not value:
                return f"{getattr(space, '__name__', space)}.{name} was patched"
        return ""


def _seen(path: str, module: nn.Module, movable: Set[int]) -> _Seen:
    own, computed = vars(module), f"{path}.".startswith(tuple(f"{root}." for root in _COMPUTED))
    moves = id(own["_parameters"].get("weight")) in movable
    children, forward = dict(_children(module)), own.get("forward")
    return _Seen(path, module, type(module), children, computed, _hooks(module), forward, _kind(own), moves)


def _kind(own: dict[str, Any]) -> tuple[Any, Any] | None:
    weight = own["_parameters"].get("weight")
    return None if weight is None else (weight.dtype, weight.device)


def _changed(seen: _Seen) -> str | None:
    own = vars(seen.module)
    if type(seen.module) is not seen.kind:
        return "is of another class"
    children, known = _children(seen.module), seen.children
    if len(children) != len(known) or any(map(is_not, children.values(), known.values())):
        names = (*known, *children)
        return f"has another {next((name for name in names if children.get(name) is not known.get(name)), 'order')}"
    now = _kind(own)
    if now != seen.weight and not (seen.moves and now is not None and now[0] == seen.weight[0]):
        return f"was cast or moved ({', '.join(map(str, now or ()))})"
    if not seen.computed:
        return None
    if own.get("forward") is not seen.forward:
        return "has another forward"
    if (own["_forward_hooks"] or own["_forward_pre_hooks"] or seen.hooks) and _hooks(seen.module) != seen.hooks:
        return "has another forward hook"
    return None


def _value(space: Any, name: str) -> Any:
    return vars(space).get(name, _MISSING)
