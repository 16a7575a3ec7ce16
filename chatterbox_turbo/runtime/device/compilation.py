"""``torch.compile`` where a compiler is at hand, and the plain function where none is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import describe


class _Compiled:
    """A compiled function that turns into the plain one when the compiler fails; ``reason`` then says why."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        self._function, self._compiled, self.reason = function, torch.compile(function, **options), ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reason:
            return self._function(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except Exception as error:
            compilers = ("torch._dynamo", "torch._inductor", "triton")
            if not any(base.__module__.startswith(compilers) for base in type(error).__mro__):
                raise
            reason = describe(error)
        # dynamo wraps errors of the function too: those are raised again here, and leave it compiled
        result = self._function(*args, **kwargs)
        self.reason = reason
        return result


def compiled(function: Callable, *, device: torch.device | str | None = None, **options: Any) -> tuple[Callable, str]:
    """``torch.compile(function, **options)`` and ``""``; or ``function`` itself, and why it cannot be compiled.

    If compiling fails at a call, the callable runs ``function`` from its beginning, then and ever after; its
    attribute ``reason`` says why. Errors of ``function`` and wrong options raise.

    Args:
        device: where it will run; default CUDA if there is any, else the CPU.
        options: those of ``torch.compile``.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    reason = _missing_compiler(kind) if options.get("backend", "inductor") == "inductor" else ""
    return (function, reason) if reason else (_Compiled(function, options), "")


def _missing_compiler(kind: str) -> str:
    # imported here: inductor takes seconds, and only who compiles waits for it
    from torch._dynamo import is_dynamo_supported
    from torch.utils._triton import has_triton

    if not is_dynamo_supported():
        return f"torch {torch.__version__} cannot compile on this Python or system"
    if kind != "cpu":
        return "" if has_triton() else "Triton is not installed, or does not support this GPU"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except (RuntimeError, OSError, ImportError) as error:
        return f"no C++ compiler: {describe(error)}"
    return ""
