"""What ``apply`` did, as data first and text second."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .plan import Plan


@dataclass(frozen=True)
class Report:
    """The plan as carried out, weights in memory before and now, seconds by phase of the last call, voices kept.

    ``renewals``: what had the configuration applied again. ``process``: what is different in a process that was forked
    from one that had computed.
    """

    plan: Plan
    memory_before: dict[str, Any]
    memory_now: dict[str, Any]
    timings: dict[str, float]
    voices: str = ""
    renewals: tuple[str, ...] = ()
    process: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON (a progress function by its name)."""
        config = self.plan.config.model_dump()
        if callable(config["decoding"]["progress"]):
            config["decoding"]["progress"] = repr(config["decoding"]["progress"])
        return {
            "family": self.plan.family,
            "device": self.plan.device,
            "config": config,
            "passes": [asdict(step) for step in self.plan.steps],
            "memory_before": self.memory_before,
            "memory_now": self.memory_now,
            "timings": self.timings,
            "voices": self.voices,
            "renewals": list(self.renewals),
            "process": self.process,
        }

    def __str__(self) -> str:
        lines = [str(self.plan)]
        before, now = (memory["weights"] / 2**20 for memory in (self.memory_before, self.memory_now))
        lines.append(f"weights: {now:.0f} MiB (before: {before:.0f} MiB)")
        lines += [f"applied again: {change}" for change in self.renewals]
        if self.timings:
            phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.timings.items())
            lines.append(f"last call: {phases}")
        if self.voices:
            lines.append(f"voices: {self.voices}")
        if self.process:
            lines.append(f"process: {self.process}")
        return "\n".join(lines)
