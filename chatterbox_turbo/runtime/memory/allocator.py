"""Settings of PyTorch's CUDA allocator while the process runs. They are process-wide: holds are counted.

PyTorch reads a text of settings as a whole: an option that the text does not name goes back to its default, or stays,
by the release. So what is written is always all that was there, with what is held in place of its own, and the old
values of what is taken back are written out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

import torch

from .. import forks

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
DEFAULTS = {"expandable_segments": "False"}  # that some releases keep where a text does not name them
Settings = Mapping[str, str]

_lock = forks.lock()
_held: list[Settings] = []
_before: dict[str, str] = {}


def variable() -> str:
    """The environment variable that this torch release reads before it allocates anything."""
    return VARIABLES[0] if hasattr(torch._C, "_accelerator_setAllocatorSettings") else VARIABLES[1]


def why_not(settings: Settings) -> str:
    """Why these settings cannot be made in this process; empty where they can."""
    if _setter() is None:
        return f"this PyTorch ({torch.__version__}) cannot change its CUDA allocator while it runs"
    backend = torch.cuda.memory.get_allocator_backend()
    if backend != "native":
        return f"memory is allocated by {backend}, not by PyTorch's own allocator, which these settings are of"
    if settings.get("expandable_segments") == "True" and sys.platform == "win32":
        return "PyTorch has no expandable segments on Windows"
    return ""


class Hold:
    """Settings that are in force from ``take`` to ``release``; the last hold to go restores what was there before.

    What has been allocated meanwhile stays where it is.
    """

    def __init__(self, settings: Settings):
        self._settings = dict(settings)

    def take(self) -> None:
        """Put the settings in force; those of a later hold win.

        Raises:
            RuntimeError, ValueError: PyTorch's, which does not know or take a setting; all is as before then.
        """
        with _lock:
            if not _held:
                _before.clear()
                _before.update(current())
            _held.append(self._settings)
            try:
                _write()
            except (RuntimeError, ValueError):
                _held.pop()
                _write(self._settings)
                raise

    def release(self) -> None:
        """Take them back; nothing happens where they are not in force."""
        with _lock:
            for index, one in enumerate(_held):
                if one is self._settings:
                    del _held[index]
                    _write(self._settings)
                    return


def current() -> dict[str, str]:
    """The settings in force, as far as they were ever made: by code, or in the environment."""
    getter = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if getter is not None:
        return parsed(getter())
    try:
        known = torch.cuda.memory._snapshot()["allocator_settings"]
        text = known["PYTORCH_CUDA_ALLOC_CONF"]
    except (RuntimeError, AssertionError, KeyError):  # a build without CUDA, another release
        return parsed(next((os.environ[name] for name in VARIABLES if os.environ.get(name)), ""))
    found = parsed(text)
    if known.get("expandable_segments"):  # outlives a text that does not name it
        found.setdefault("expandable_segments", "True")
    return found


def parsed(text: str) -> dict[str, str]:
    """``name:value,name:value`` by name; a value may be a list in brackets."""
    pairs = (part.partition(":") for part in re.split(r",(?![^\[]*\])", text) if part.strip())
    return {name.strip(): value.strip() for name, _, value in pairs}


def ordinary_bytes(device: torch.device) -> int:
    """Bytes on a device in segments that cannot grow, where expandable ones came too late for."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = (one for one in torch.cuda.memory_snapshot() if one.get("device") == index)
    return sum(one["total_size"] for one in segments if not one.get("is_expandable"))


def _write(gone: Settings = {}) -> None:  # noqa: B006 (read only)
    settings = dict(_before)
    for one in _held:
        settings.update(one)
    for name in gone:
        if name in DEFAULTS:
            settings.setdefault(name, DEFAULTS[name])
    _setter()(",".join(f"{name}:{value}" for name, value in settings.items()))


def _setter():
    new = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if new is not None or hasattr(torch._C, "_cuda_cudaCachingAllocator_set_allocator_settings"):
        return new or torch.cuda.memory._set_allocator_settings
    return None
