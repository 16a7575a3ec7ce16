"""What a measurement has to say about where it was made."""

from __future__ import annotations

import os
import platform
import shlex
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from .screen import PROGRAM

PACKAGES = ("torch", "transformers", "chatterbox-tts", "resemble-perth")


def provenance(arguments: list[str]) -> dict[str, Any]:
    """Date, machine, versions, and the command line that made a result."""
    return {
        "command": shlex.join([PROGRAM, *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "chatterbox-turbo": __version__,
            "python": platform.python_version(),
            **{package: version(package) or "not installed" for package in PACKAGES},
        },
    }


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, threads of torch, memory in bytes (a container's), GPUs."""
    import torch

    from ..runtime.cpu.process_memory import available

    _, memory = available() or (0, None)
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "gpu": ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) or None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def summary(data: dict[str, Any]) -> str:
    """``provenance`` in two lines."""
    here, versions = data["machine"], data["versions"]
    gpu = f", {here['gpu']}" if here["gpu"] else ""
    packages = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "resemble-perth")
    return f"{data['date']}  {here['cpu']}, {here['cores']} cores, {here['threads']} threads{gpu}\n{packages}"


def version(package: str) -> str:
    """The installed version, or an empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu_model() -> str:
    """The processor's name, as good as the system knows it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
