"""Hooks for the moment when upstream's modules have been imported, and the wrappers around their classes' loaders.

The classes stay what they are; only ``from_pretrained`` and ``from_local`` in their dictionaries are wrapped. So it is
the same whether a program has taken a class out of its module before or after, and subclasses come here as well.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import wrapt

from ..upstream.class_names import CLASSES, LOADERS
from .messages import refuse
from .settings import Settings

if TYPE_CHECKING:
    from ..config import OptimizationConfig


class _Wrapped(NamedTuple):
    cls: type
    name: str
    before: Any
    wrapper: Any


_settings: Settings | None = None
_config: OptimizationConfig | None = None
_wrapped: list[_Wrapped] = []


def install(settings: Settings) -> None:
    """From now on, models of upstream's classes are optimized as they are loaded; where that is so already, nothing."""
    global _settings
    if _settings is None:
        _settings = settings
        for module in dict.fromkeys(module for module, _ in CLASSES.values()):
            wrapt.register_post_import_hook(_imported, module)


def uninstall() -> None:
    """Take the wrappers off the classes, and forget the settings.

    A wrapper that somebody has wrapped since stays where it is and does nothing any more.
    """
    global _settings, _config
    _settings = _config = None
    while _wrapped:
        one = _wrapped.pop()
        if vars(one.cls).get(one.name) is one.wrapper:
            setattr(one.cls, one.name, one.before)


def _imported(module: ModuleType) -> None:
    if _settings is None or not _configured():
        return
    for name in dict.fromkeys(name for home, name in CLASSES.values() if home == module.__name__):
        cls = getattr(module, name, None)
        if not isinstance(cls, type):
            refuse(f"There is no class {name} in {_place(module)}.", _settings.strict)
            continue
        if not any(loader in vars(cls) for loader in LOADERS):
            refuse(f"{name} in {_place(module)} has neither {' nor '.join(LOADERS)}.", _settings.strict)
        for loader in LOADERS:
            before = vars(cls).get(loader)
            if before is not None and not any((one.cls, one.name) == (cls, loader) for one in _wrapped):
                wrapper = wrapt.FunctionWrapper(before, _load)
                setattr(cls, loader, wrapper)
                _wrapped.append(_Wrapped(cls, loader, before, wrapper))


def _place(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


def _configured() -> bool:
    """Whether there is a configuration: read once, with the first module, so that what is wrong is told early."""
    global _config
    if _config is None:
        try:
            from ..config import resolve

            _config = resolve(_settings.config)
        except Exception as error:  # a wrong configuration, or a package that is missing
            refuse(f"Chatterbox models cannot be optimized: {error}", _settings.strict)
    return _config is not None


def _load(wrapped: Any, instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """In place of a loader: ``instance`` is the class, ``wrapped`` its own loader."""
    settings, config = _settings, _config
    optimized = None
    if settings is not None and config is not None:
        try:
            from .models import optimized
        except Exception as error:  # a package is missing, or does not fit
            refuse(f"{instance.__name__} cannot be optimized: {type(error).__name__}: {error}.", settings.strict)
    if optimized is None:
        return wrapped(*args, **kwargs)
    return optimized(wrapped, instance, args, kwargs, settings, config)
