"""What ``apply`` will do, decided before anything is touched, and its execution as one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .config import Fidelity, OptimizationConfig, exceeds
from .errors import ForeignPatchError, InvalidConfigError, PassConflictError, TurboError, UnavailablePassError
from .passes.base import Context, Pass
from .upstream.families import FAMILIES, TITLES
from .upstream.patch_points import check, patch_points

Status = Literal["on", "skipped", "off"]
MARKS = {"on": "+", "skipped": "-", "off": " "}


@dataclass(frozen=True)
class Step:
    """One pass in a plan: ``on`` (will run), ``skipped`` (``auto`` and cannot run) or ``off`` (not asked for)."""

    name: str
    status: Status
    fidelity: Fidelity
    reason: str = ""
    summary: str = ""


@dataclass(frozen=True)
class Plan:
    """The passes of a configuration on one model, in the order of application.

    Attributes:
        config: in force, options that were chosen for a budget included.
        fit: what was chosen for a budget or by ``auto``, and why (``budget.fitting.Fit``); ``None`` where nothing was.
        asked: the configuration that it was chosen for.
    """

    family: str
    device: str
    config: OptimizationConfig
    steps: tuple[Step, ...]
    passes: tuple[Pass, ...]
    fit: Any = None
    asked: OptimizationConfig | None = None

    @property
    def request(self) -> OptimizationConfig:
        """What was asked for; to be planned anew where the model has changed."""
        return self.asked or self.config

    def step(self, name: str) -> Step:
        """The step of one pass; ``KeyError`` where there is none."""
        return {step.name: step for step in self.steps}[name]

    @property
    def running(self) -> list[str]:
        """Names of the passes that run, in order."""
        return [step.name for step in self.steps if step.status == "on"]

    def __str__(self) -> str:
        """One line a pass: + runs, - skipped, blank not asked for."""
        head = f"{TITLES[self.family]} on {self.device}, fidelity at most {self.config.fidelity}"
        if self.request.preset:
            head += f", preset {self.request.preset}"
        lines = [head]
        if self.fit is not None:
            lines.append(f"  {self.fit}")
        for step in self.steps:
            reason = f": {step.reason}" if step.reason else ""
            lines.append(f"  {MARKS[step.status]} {step.name:<12} {step.fidelity:<9} {step.status}{reason}")
        return "\n".join(lines)


def build_plan(context: Context, passes: Sequence[Pass]) -> Plan:
    """Decide each pass. Reads the model, changes nothing; ``context.journal`` tells own patches from foreign.

    Raises:
        InvalidConfigError: two passes of one name, a patch point that no family has, or a demanded pass above
            the fidelity ceiling.
        UnavailablePassError, ForeignPatchError: a demanded pass cannot run.
        PassConflictError: two demanded passes exclude each other.
    """
    names = [p.name for p in passes]
    for name in names:
        if not name or names.count(name) > 1:
            raise InvalidConfigError(f"Pass name {name!r} is empty or used twice.", "", "Give each pass its own name.")
    known = {path for family in FAMILIES for path in patch_points(family)}
    for p in passes:
        for path in (*p.patch_points, *p.replaces):
            if path not in known:
                raise InvalidConfigError(
                    f"The pass {p.name!r} names the patch point {path!r}.",
                    "No family has one of that name, so nothing would be checked.",
                    f"Known are: {', '.join(sorted(known))}; the list is in upstream/patch_points.py.",
                )
    decided: dict[str, Step] = {}
    running: list[Pass] = []
    for p in sorted(passes, key=lambda p: bool(p.needs)):  # stable
        status, reason = _decide(p, context, running)
        decided[p.name] = Step(p.name, status, p.fidelity(context), reason, p.summary)
        if status == "on":
            running.append(p)
            context.planned.append(p.name)
    parts = context.parts
    steps = tuple(decided[p.name] for p in passes)
    return Plan(parts.family, str(parts.device), context.config, steps, tuple(passes))


def _decide(p: Pass, context: Context, running: list[Pass]) -> tuple[Status, str]:
    section = p.section(context.config)
    if section.enabled is False:
        return "off", "disabled in the configuration"
    if idle := p.idle(context):
        return "off", idle
    reason, error = _obstacle(p, context, running, demanded=section.enabled is True)
    if not reason:
        return "on", ""
    if section.enabled is True:
        raise error(
            f"The pass {p.name!r} is demanded but cannot run: {reason}.",
            "",
            f'Set {p.name}.enabled = "auto" to skip it where it cannot run.',
        )
    return "skipped", reason


def _obstacle(p: Pass, context: Context, running: list[Pass], demanded: bool) -> tuple[str, type[TurboError]]:
    """Why a pass cannot run, and the error that fits; an empty reason where it can."""
    parts, config = context.parts, context.config
    if parts.family not in p.families:
        return f"it does not apply to {TITLES[parts.family]}", UnavailablePassError
    promise = p.fidelity(context)
    if exceeds(promise, config.fidelity):
        reason = f'it is {promise}, above the ceiling fidelity = "{config.fidelity}"'
        return reason, InvalidConfigError
    for other in running:
        if other.name in p.conflicts or p.name in other.conflicts:
            both = demanded and other.section(config).enabled is True
            return f"it conflicts with {other.name}", PassConflictError if both else UnavailablePassError
    reason = p.check(context)  # before the patch points: it knows the remedy
    if reason:
        return reason, UnavailablePassError
    points = patch_points(parts.family)
    for path in p.patch_points:
        if path not in points:  # another family's
            continue
        finding = check(parts, points[path], context.journal)
        matters = not finding.forceable or (path in p.replaces and not demanded)
        if finding.problem and matters:
            hint = f"; {p.name}.enabled = true uses it all the same" if finding.forceable else ""
            return finding.problem + hint, ForeignPatchError if finding.foreign else UnavailablePassError
    return "", UnavailablePassError


def carry_out(plan: Plan, context: Context) -> Plan:
    """Apply every pass that is on, through ``context``; the plan with the passes' remarks as reasons.

    Raises whatever a pass raises, after the journal has been undone: all or nothing.
    """
    steps = list(plan.steps)
    context.planned = plan.running
    try:
        for index, (p, step) in enumerate(zip(plan.passes, plan.steps, strict=True)):
            if step.status == "on":
                steps[index] = replace(step, reason=p.apply(context) or "")
                context.applied.append(p.name)
    except BaseException:
        context.arguments.clear()
        context.scopes.clear()
        context.settings.clear()
        context.retries.clear()
        context.journal.undo(insist=True)
        raise
    return replace(plan, steps=tuple(steps))
