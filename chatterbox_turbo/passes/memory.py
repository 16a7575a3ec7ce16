"""The cache policy: what is kept of memory that nobody uses, when it is given back, and what that costs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import MemorySection
from ..errors import describe
from ..runtime.cpu.host_memory import gives_back, keep_freed_blocks
from ..runtime.memory import allocator
from ..runtime.memory.clearing import LONG, CachePolicy
from ..upstream.families import device_of
from .base import Context, Pass

KEPT = (
    "freed blocks of up to 32 MB stay with the process (glibc; not undone by revert, for its threshold only rises, and "
    "a program that frees large blocks raises it anyway)"
)
EARLIER = "{mib:.0f} MiB were allocated before and stay in ordinary segments: {advice} has them in expandable ones too"


class MemoryPass(Pass):
    """Gives memory back to driver and system by a policy, and lets PyTorch's CUDA allocator lay it out otherwise.

    Nothing of it changes what is computed.
    """

    name = "memory"
    summary = "cache policy: freed memory kept, or given back under pressure or after each request; allocator settings"

    def check(self, context: Context) -> str:
        section, device = context.config.memory, context.parts.device
        if section.enabled is not True:
            return ""
        return "; ".join(_obstacles(section, device).values())

    def apply(self, context: Context) -> str:
        section, parts = context.config.memory, context.parts
        device = parts.device
        obstacles, remarks = _obstacles(section, device), [section.profile]
        policy = CachePolicy(section.chosen("clear"), section.free_below, vocoder=True)
        context.caches = policy
        if device.type == "cpu" and gives_back():
            if section.chosen("keep_blocks"):
                keep_freed_blocks()
                remarks.append(KEPT)
            remarks.append(f"given back before the vocoder of {LONG / 50:.0f} s and more")
        settings = wanted(section, device)
        if settings and not obstacles.keys() & {"allocator"}:
            remarks.append(_hold(settings, context))
        if policy.when != "never" and "clear" not in obstacles:
            model = weakref.ref(parts.model)  # whoever keeps the settings need not keep the model
            context.settings.append(lambda: policy.around(lambda: device_of(model())))
            when = {"between": "after each request", "pressure": f"while less than {section.free_below:.0%} is free"}
            remarks.append(f"given back {when[policy.when]}")
        remark = "; ".join([*remarks, *(f"not {name}: {reason}" for name, reason in obstacles.items())])
        context.remarks[self.name] = lambda: "; ".join(filter(None, (remark, str(policy.tally))))
        return remark


def wanted(section: MemorySection, device: torch.device) -> dict[str, str]:
    """The settings that a section asks PyTorch's CUDA allocator for, for a model on this device."""
    if device.type != "cuda" or section.enabled is False:
        return {}
    settings = {}
    if section.chosen("expandable_segments"):
        settings["expandable_segments"] = "True"
    elif section.expandable_segments is False:  # asked for by name: also against the environment
        settings["expandable_segments"] = "False"
    if section.max_split_mb is not None:
        settings["max_split_size_mb"] = str(section.max_split_mb)
    return settings


@contextmanager
def while_loading(section: MemorySection, device: torch.device) -> Iterator[None]:
    """Have the weights of a model that is loaded in the body where the settings would put them.

    Whoever applies the section before the body ends takes the settings over. What cannot be set, ``apply`` reports.
    """
    settings = wanted(section, device)
    if not settings or allocator.why_not(settings):
        yield
        return
    hold = allocator.Hold(settings)
    try:
        hold.take()
    except (RuntimeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        hold.release()


def _hold(settings: dict[str, str], context: Context) -> str:
    """Put settings in force until the journal is undone; the remark."""
    device, hold = context.parts.device, allocator.Hold(settings)
    context.journal.record("settings of PyTorch's CUDA allocator", hold.release)
    text = ", ".join(f"{name}:{value}" for name, value in settings.items())
    try:
        hold.take()
    except (RuntimeError, ValueError) as error:
        return f"not {text}: {describe(error)}; set {allocator.variable()}={text.replace(' ', '')} in the environment"
    remark = f"allocator of the process with {text}"
    earlier = allocator.ordinary_bytes(device) if settings.get("expandable_segments") == "True" else 0
    if earlier:
        advice = f"{allocator.variable()}=expandable_segments:True in the environment, or turbo.load,"
        remark += f" for what is allocated from now on ({EARLIER.format(mib=earlier / 2**20, advice=advice)})"
    return remark


def _obstacles(section: MemorySection, device: torch.device) -> dict[str, str]:
    """Why something that is asked for cannot be had here, by what it is."""
    found = {}
    asked = [name for name in ("expandable_segments", "max_split_mb") if getattr(section, name) not in (None, False)]
    settings = wanted(section, device)
    if asked and device.type != "cuda":
        names = " and ".join(f"memory.{name}" for name in asked)
        found["allocator"] = f"{names} is of PyTorch's CUDA allocator, and the model is on {device}"
    elif settings and (reason := allocator.why_not(settings)):
        text = ",".join(f"{name}:{value}" for name, value in settings.items())
        found["allocator"] = f"{reason}; where it can be had, {allocator.variable()}={text} in the environment sets it"
    if section.chosen("clear") != "never" and device.type == "cpu" and not gives_back():
        found["clear"] = "this C library is not glibc, and cannot be asked for what it keeps"
    if section.chosen("clear") != "never" and device.type not in ("cpu", "cuda", "mps"):
        found["clear"] = f"memory on {device} is not known here"
    return found
