"""What ``apply`` did, as data first and text second."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .memory.table import fragmentation
from .plan import Plan


@dataclass(frozen=True)
class Report:
    """The plan as carried out, weights in memory before and now, seconds by phase of the last call, voices kept.

    ``taken``: bytes that the model took at most, by phase, to be compared with ``plan.fit.estimate``.
    ``notes``: what is to be known of this device, and of what has been replaced since ``apply``, and of this process.
    """

    plan: Plan
    memory_before: dict[str, Any]
    memory_now: dict[str, Any]
    timings: dict[str, float]
    voices: str = ""
    notes: tuple[str, ...] = ()
    taken: dict[str, int] = field(default_factory=dict)

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
            "budget": self.plan.fit and {**self.plan.fit.to_dict(), "measured": self.taken},
        }

    def __str__(self) -> str:
        lines = [str(self.plan)]
        before, now = (memory["weights"] / 2**20 for memory in (self.memory_before, self.memory_now))
        lines.append(f"weights: {now:.0f} MiB (before: {before:.0f} MiB)")
        if self.plan.fit is not None:
            lines += self._budget()
        if self.timings:
            phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.timings.items())
            lines.append(f"last call: {phases}")
        if self.memory_now.get("held_bytes"):
            lines.append(f"beside the weights: {self.memory_now['held_bytes'] / 2**20:.0f} MiB (memory() lists them)")
        if self.memory_now.get("fragmentation"):
            lines.append(f"allocator: {fragmentation(self.memory_now['fragmentation'])}")
        if self.voices:
            lines.append(f"voices: {self.voices}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _budget(self) -> list[str]:
        """Estimate and measurement by phase."""
        made = self.plan.fit.estimate
        rows = [
            f"  {name:<13}{size / 2**20:>9.0f}" + (f"{self.taken[name] / 2**20:>13.0f}" if name in self.taken else "")
            for name, size in made.by_phase().items()
        ]
        head = f"memory of {self.plan.fit.kind} by phase, MiB: estimated for {made.tokens} tokens, measured so far"
        return [head, *rows]
