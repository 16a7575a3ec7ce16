"""The plan of a configuration with a budget: the first setting of the ladder that fits, or why none does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import FIDELITIES, OptimizationConfig
from ..config.amounts import gigabytes, parse
from ..errors import BudgetError, TurboError, describe
from ..passes import Context, Pass
from ..patching import Journal
from ..plan import Plan, build_plan
from ..runtime.memory import readings
from ..upstream.families import Parts
from .estimate import Estimate, estimate
from .ladder import AS_CONFIGURED, LADDER, LOSSLESS, Rung, Values, rungs
from .machine import Machine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tried:
    """One setting: bytes that it needs, or why it cannot be had."""

    name: str
    needed: int | None
    obstacle: str = ""


@dataclass(frozen=True)
class Fit:
    """What was chosen for a budget, or by ``auto`` for a machine.

    Attributes:
        kind: ``vram_budget``, ``memory_budget``, or ``auto``.
        size: bytes that there are for the model; ``written``: as the user wrote it.
        chosen: of the ladder; ``tried``: that and what comes before it.
        notes: what is to be known besides.
    """

    kind: str
    size: int
    written: str
    chosen: str
    estimate: Estimate
    tried: tuple[Tried, ...]
    notes: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """In words, why nothing before it was taken."""
        before = [f"{one.name}: {gigabytes(one.needed) if one.needed else one.obstacle}" for one in self.tried[:-1]]
        return "; ".join(before)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        own = {"kind": self.kind, "bytes": self.size, "written": self.written, "chosen": self.chosen}
        return {**own, "tried": [asdict(one) for one in self.tried], "estimate": self.estimate.to_dict(),
                "notes": list(self.notes)}  # fmt: skip

    def __str__(self) -> str:
        made = self.estimate
        head = f"{self.kind} {self.written}" if self.kind != "auto" else f"auto, by the machine ({self.written})"
        for_what = f"{made.tokens} speech tokens" + (f", {made.slots} at once" if made.slots > 1 else "")
        text = f"{head}: {self.chosen}, at most {gigabytes(made.needed)} for {for_what}"
        return f"{text} ({self.why})" if self.why else text


def plan_within(parts: Parts, config: OptimizationConfig, journal: Journal, passes: Sequence[Pass]) -> Plan:
    """The plan of a configuration: ``build_plan``, then ``fit``, whose errors these are."""
    return fit(build_plan(Context(parts, config, journal), passes), parts, config, journal, passes)


def fit(plan: Plan, parts: Parts, config: OptimizationConfig, journal: Journal, passes: Sequence[Pass]) -> Plan:
    """A plan with options chosen where there is a budget or the preset auto; otherwise the plan itself.

    Args:
        parts: of a model whose weights are as they were before ``apply``.

    Raises:
        BudgetError: nothing that the ceiling allows fits, or the device cannot have such a budget.
    """
    if config.budget is not None:
        return _within_budget(plan, parts, config, journal, passes)
    if config.preset != "auto":
        return plan
    try:
        return _by_machine(plan, parts, config, journal, passes)
    except Exception as error:  # of a model that nobody has asked to be measured
        logger.debug("The memory of this model cannot be estimated: %s", describe(error))
        return plan


def _within_budget(
    plan: Plan, parts: Parts, config: OptimizationConfig, journal: Journal, passes: Sequence[Pass]
) -> Plan:
    size, total = _size_of(parts, config)
    kind = "vram_budget" if config.vram_budget is not None else "memory_budget"
    tried: list[Tried] = []
    for rung, other, made in _plans(parts, config, journal, passes, LADDER, tried):
        if made.needed <= size:
            notes = _notes(parts, size, made)
            found = Fit(kind, size, _written(config.budget, size, total), rung.name, made, tuple(tried), notes)
            return replace(plan if rung.name == AS_CONFIGURED else other, fit=found, asked=config)
    raise _refusal(parts, config, journal, passes, kind, size, tried)


def _by_machine(plan: Plan, parts: Parts, config: OptimizationConfig, journal: Journal, passes: Sequence[Pass]) -> Plan:
    """What ``auto`` chooses: all that is lossless, and where memory is short, what saves some of it."""
    machine, tried = Machine.of(parts.device), []
    size = machine.free + sum(_resident(parts).values())
    smallest = None
    for rung, own, made in _plans(parts, config, journal, passes, LOSSLESS, tried):
        if smallest is None or made.needed < smallest[2].needed:
            smallest = (rung, own, made)
        if made.needed <= size:
            break
    rung, own, made = smallest
    notes = ()
    if made.needed > size:
        preset, why = machine.preset()
        text = f"{gigabytes(made.needed)} are needed at most, and {gigabytes(size)} are there for this model"
        notes = (f"memory is too small for the lossless set: {text}. Recommended here: the preset {preset} ({why})",)
    found = Fit("auto", size, str(machine), rung.name, made, tuple(tried), notes)
    return replace(plan if rung.name == AS_CONFIGURED else own, fit=found, asked=config)


def _plans(parts, config, journal, passes, ladder: tuple[tuple[str, Values], ...], tried: list[Tried]):
    """Each rung that can be had, with its plan and estimate; ``tried`` grows."""
    least: int | None = None
    for rung in rungs(config, parts.device.type == "cpu", ladder):
        if rung.config is None:
            tried.append(Tried(rung.name, None, rung.obstacle))
            continue
        plan, made, obstacle = _look(parts, rung, journal, passes)
        if obstacle or (least is not None and made.needed >= least and rung.name != AS_CONFIGURED):
            tried.append(Tried(rung.name, None, obstacle or "no smaller than what comes before"))
            continue
        least = made.needed if least is None else min(least, made.needed)
        tried.append(Tried(rung.name, made.needed))
        yield rung, plan, made


def _look(
    parts: Parts, rung: Rung, journal: Journal, passes: Sequence[Pass]
) -> tuple[Plan | None, Estimate | None, str]:
    """The plan of a rung and what it needs, or why it cannot be had."""
    try:
        plan = build_plan(Context(parts, rung.config, journal), passes)
    except TurboError as error:
        if rung.name == AS_CONFIGURED:
            raise
        return None, None, error.what
    wanted = dict(LADDER)[rung.name]
    skipped = [plan.step(name) for name in wanted if plan.step(name).status != "on"]
    # half precision that a device is not good at is no reason to leave int8
    vital = [step for step in skipped if step.name != "precision" or len(wanted) == 1]
    if vital:
        return None, None, "; ".join(f"{step.name}: {step.reason}" for step in vital)
    context = Context(parts, rung.config, journal)
    context.planned = plan.running
    return plan, estimate(context), ""


def _size_of(parts: Parts, config: OptimizationConfig) -> tuple[int, int]:
    """Bytes of the budget, and of what the device has in all.

    Raises:
        BudgetError: a budget of the wrong kind, or above what there is.
    """
    device, on_host = parts.device, parts.device.type == "cpu"
    asked, other = (
        ("vram_budget", "memory_budget") if config.vram_budget is not None else ("memory_budget", "vram_budget")
    )
    if on_host != (asked == "memory_budget"):
        what = "a GPU's memory" if asked == "vram_budget" else "the memory of a process on a CPU"
        raise BudgetError(
            f"{asked} is {config.budget!r}, but the model is on {device}.",
            f"It is of {what}.",
            f"Set {other} instead.",
        )
    there = readings.free(device)
    amount = parse(config.budget)
    if there is None:
        if amount.size is None:
            raise BudgetError(
                f"{asked} is {config.budget!r}, and how much memory {device} has is not known.", "", "Set bytes."
            )
        return amount.size, 0
    free, total = there
    size = amount.of(total)
    if size > total:
        raise BudgetError(
            f"{asked} is {config.budget!r}, but {'this machine' if on_host else device} has {gigabytes(total)}.",
            "What does not exist cannot be kept to.",
            f'Set at most that, or a share such as "80%"; {gigabytes(free)} are free now.',
        )
    return size, total


def _written(budget: Any, size: int, total: int) -> str:
    share = isinstance(budget, str) and budget.strip().endswith("%")
    return f"{budget} of {gigabytes(total)}: {gigabytes(size)}" if share else str(budget)


def _notes(parts: Parts, size: int, made: Estimate) -> tuple[str, ...]:
    there = readings.free(parts.device)
    free = there[0] + sum(_resident(parts).values()) if there else size
    if free < made.needed:
        return (f"only {gigabytes(free)} of {parts.device} are free for this model now: others hold the rest",)
    return ()


def _resident(parts: Parts) -> dict[str, int]:
    """Bytes of weights on the model's device as it is now."""
    return {
        name: sum(t.numel() * t.element_size() for t in module.parameters() if t.device.type == parts.device.type)
        for name, module in parts.modules().items()
    }


def _refusal(parts, config, journal, passes, kind: str, size: int, tried: list[Tried]) -> BudgetError:
    """What would do, by fidelity."""
    needed: dict[str, int] = {}
    own = [one.needed for one in tried if one.needed]
    if own:
        needed[config.fidelity] = min(own)
    for fidelity in FIDELITIES[FIDELITIES.index(config.fidelity) + 1 :]:
        wider: list[Tried] = []
        try:
            for _ in _plans(parts, config.model_copy(update={"fidelity": fidelity}), journal, passes, LADDER, wider):
                pass
        except TurboError:
            continue
        least = min((one.needed for one in wider if one.needed), default=None)
        if least is not None and least < min(needed.values(), default=least + 1):
            needed[fidelity] = least
    ways = [
        f'fidelity = "{name}" allows {gigabytes(least)}' for name, least in needed.items() if name != config.fidelity
    ]
    least = needed.get(config.fidelity)
    return BudgetError(
        f"{kind} is {config.budget!r} ({gigabytes(size)}), and nothing fits into it.",
        "; ".join(f"{one.name}: {gigabytes(one.needed) if one.needed else one.obstacle}" for one in tried) + ".",
        (f"The smallest budget that would do is {_rounded_up(least)}" if least else "No set of passes can be had")
        + (f"; {'; '.join(ways)}" if ways else "")
        + ". Shorter speech (decoding.max_new_tokens) and fewer utterances at once (budget_slots) need less.",
        needed,
    )


def _rounded_up(size: int) -> str:
    return f"{-(-size // 10**6)}MB"
