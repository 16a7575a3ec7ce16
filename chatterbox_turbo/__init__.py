"""Speed up chatterbox-tts with one reversible line: ``chatterbox_turbo.apply(model)``.

Importing this package imports neither torch nor chatterbox: a name is loaded when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "load": "api",
    "quantize": "api",
    "apply": "api",
    "revert": "api",
    "optimized": "api",
    "inspect": "api",
    "OptimizationConfig": "config",
    "Pass": "passes.base",
    "synthetic": "synthetic",
    "errors": "errors",
    "TurboError": "errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    return module if _HOME[name] == name else getattr(module, name)
