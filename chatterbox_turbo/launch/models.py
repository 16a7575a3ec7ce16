"""A model as a program asked for it, loaded by this package and optimized: what the wrapped loaders do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch

from ..api import apply, load
from ..config import OptimizationConfig
from ..handle import ATTRIBUTE, Handle
from ..passes.memory import while_loading
from ..upstream.class_names import FOLDER
from ..upstream.rebinding import original, running
from . import reports
from .messages import refuse, say
from .settings import Settings


def optimized(
    wrapped: Any, cls: Any, args: tuple, kwargs: dict[str, Any], settings: Settings, config: OptimizationConfig
) -> Any:
    """The model that ``wrapped(*args, **kwargs)`` would give, optimized where that can be done.

    ``wrapped`` itself loads where this package cannot, and what it raises is the program's own affair. What the model
    would be without is what it is after anything else has failed.

    Args:
        wrapped: ``from_pretrained`` or ``from_local`` of ``cls``, bound to it.
    """
    if running():  # this package asks for upstream's own
        return wrapped(*args, **kwargs)
    asked = _asked(wrapped, cls, args, kwargs)
    with _settings_in_force(config, asked):
        model, problem = _loaded(cls, asked) if asked else (None, "")
        if model is None:
            model = wrapped(*args, **kwargs)
            if isinstance(getattr(model, "__dict__", {}).get(ATTRIBUTE), Handle):
                return model  # from_pretrained has come by from_local
            if problem:
                say(f"{cls.__name__} was loaded by upstream's own {wrapped.__name__}, at its speed: {problem}")
        try:
            apply(model, config)
        except Exception as error:
            refuse(f"{type(model).__name__} is not optimized: {_sentence(error)}", settings.strict)
            return model
    if settings.report is not None:
        reports.append(settings.report, model)
    return model


def _asked(wrapped: Any, cls: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of ``load`` for a call; ``None`` where upstream's own has to answer it.

    That is so where the arguments do not fit, and in a subclass whose own loader called this one: ``load`` would run
    the subclass's once more.
    """
    function = original(wrapped)
    if function is None or original(getattr(cls, wrapped.__name__)) is not function:
        return None
    try:
        bound = signature(wrapped).bind(*args, **kwargs)
    except TypeError:
        return None
    asked: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is Parameter.VAR_POSITIONAL:
            return None
        asked.update(value if kind is Parameter.VAR_KEYWORD else {name: value})
    local = wrapped.__name__ == "from_local"
    if asked.get("device") is None or (asked.get(FOLDER) is None) is local:
        return None
    return {"folder": asked.pop(FOLDER), **asked} if local else asked


def _loaded(cls: Any, asked: dict[str, Any]) -> tuple[Any, str]:
    """The model by this package's loader, or ``None`` and why not."""
    try:
        return load(cls, optimize=False, **asked), ""
    except Exception as error:
        return None, _sentence(error)


@contextmanager
def _settings_in_force(config: OptimizationConfig, asked: dict[str, Any] | None) -> Iterator[None]:
    """What a configuration asks of memory, while a model is loaded and the configuration applied."""
    try:
        device = torch.device(str(asked["device"])) if asked else None
    except RuntimeError:  # a device that there is not: upstream's own says so
        device = None
    if device is None:
        yield
        return
    with while_loading(config.memory, device):
        yield


def _sentence(error: Exception) -> str:
    """An error's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
