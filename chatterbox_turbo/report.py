"""What ``apply`` did, as data first and text second."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .plan import Plan
from .upstream.families import TITLES

MARKS = {"on": "+", "skipped": "-", "off": " "}


@dataclass(frozen=True)
class Report:
    """The plan as carried out, weights in memory before and now, seconds by phase of the last call, voices kept."""

    plan: Plan
    memory_before: dict[str, Any]
    memory_now: dict[str, Any]
    timings: dict[str, float]
    voices: str = ""

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
        }

    def __str__(self) -> str:
        lines = [render_plan(self.plan)]
        before, now = (memory["weights"] / 2**20 for memory in (self.memory_before, self.memory_now))
        lines.append(f"weights: {now:.0f} MiB (before: {before:.0f} MiB)")
        if self.timings:
            phases = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.timings.items())
            lines.append(f"last call: {phases}")
        if self.voices:
            lines.append(f"voices: {self.voices}")
        return "\n".join(lines)


def render_plan(plan: Plan) -> str:
    """One line a pass: + runs, - skipped, blank not asked for."""
    head = f"{TITLES[plan.family]} on {plan.device}, fidelity at most {plan.config.fidelity}"
    if plan.config.preset:
        head += f", preset {plan.config.preset}"
    lines = [head]
    for step in plan.steps:
        reason = f": {step.reason}" if step.reason else ""
        lines.append(f"  {MARKS[step.status]} {step.name:<10} {step.fidelity:<9} {step.status}{reason}")
    return "\n".join(lines)
