"""What ``apply`` did, as data first and text second."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .plan import Plan


@dataclass(frozen=True)
class Report:
    """The plan as carried out, weights in memory before and now, seconds by phase of the last call, voices kept.

    ``notes``: what is to be known of this device, and of what has been replaced since ``apply``, and of this process.
    """

    plan: Plan
    memory_before: dict[str, Any]
    memory_now: dict[str, Any]
    timings: dict[str, float]
    voices: str = ""
    notes: tuple[str, ...] = ()

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
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [str(self.plan)]
        before, now = (memory["weights"] / 2**20 for memory in (self.memory_before, self.memory_now))
        lines.append(f"weights: {now:.0f} MiB (before: {before:.0f} MiB)")
        if self.timings:
            phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.timings.items())
            lines.append(f"last call: {phases}")
        if self.voices:
            lines.append(f"voices: {self.voices}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
