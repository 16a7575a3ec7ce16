"""A configuration as it can be measured beside upstream, on the one model that both sides share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..api import inspect
from ..budget.ladder import AS_CONFIGURED
from ..config import Config, OptimizationConfig
from ..passes.base import Pass
from ..passes.token_model import UPSTREAMS_LIMIT, longest_of
from ..plan import Plan
from ..speech.long_text import fits, splitting_of
from ..text import pieces
from ..upstream.families import Parts, identify

WITHOUT_TEXT = (
    "measured with text.enabled = false: the text would be said in pieces, of which upstream has no like; "
    "both sides say it at once, up to their limits"
)


@dataclass(frozen=True)
class Beside:
    """What is measured: ``plan`` of what was asked for, ``config`` that is applied, ``notes`` on how they differ."""

    plan: Plan
    config: OptimizationConfig
    notes: tuple[str, ...] = ()


def beside_upstream(
    model: Any, config: Config, requests: Sequence[dict[str, Any]], passes: Sequence[Pass] = ()
) -> Beside:
    """The options in force, but for what would leave nothing of upstream to compare with.

    What a budget or ``auto`` chooses is chosen here, once for all runs. Original weights are kept, since upstream's
    next run needs them. A text that would be cut is said at once.

    Args:
        requests: keyword arguments of ``generate``.

    Raises: as ``inspect``.
    """
    plan = inspect(model, config, passes=passes)
    parts, chosen, notes = identify(model), plan.config, []
    if plan.fit is not None:
        free = {"preset": None, "vram_budget": None, "memory_budget": None, "budget_slots": 1}
        chosen = chosen.model_copy(update=free)
        if plan.fit.kind != "auto" or plan.fit.chosen != AS_CONFIGURED:
            notes.append(str(plan.fit))
    chosen, note = _reversible(parts, plan, chosen)
    notes += [note] if note else []
    chosen, note = at_once(parts, plan, chosen, requests)
    notes += [note] if note else []
    return Beside(plan, chosen, tuple(notes))


def _reversible(parts: Parts, plan: Plan, config: OptimizationConfig) -> tuple[OptimizationConfig, str]:
    """The configuration with original weights kept, and what that changes."""
    names = [name for name in ("quantization", "precision") if getattr(config, name).originals == "discard"]
    kept = {name: getattr(config, name).model_copy(update={"originals": "host"}) for name in names}
    config = config.model_copy(update=kept)
    running = [f"{name}.originals" for name in names if plan.step(name).status == "on"]
    if not running:
        return config, ""
    note = f'measured with {" and ".join(running)} = "host" instead of "discard": upstream\'s next run needs them'
    if parts.device.type == "cpu":
        note += "; the peak memory of optimized has them in it, which it would not have"
    return config, note


def at_once(
    parts: Parts, plan: Plan, config: OptimizationConfig, requests: Sequence[dict[str, Any]]
) -> tuple[OptimizationConfig, str]:
    """The configuration without cutting texts where it would cut one of the requests', and what that changes.

    Pieces are decoded side by side with seeds of their own: there is no one sequence of tokens to compare.
    """
    if parts.t3 is None or plan.step("text").status != "on":
        return config, ""
    decoding = plan.step("decoding").status == "on"
    limit = longest_of(parts.t3, config.decoding) if decoding else UPSTREAMS_LIMIT
    if not any(_is_cut(request, config, limit) for request in requests):
        return config, ""
    return config.model_copy(update={"text": config.text.model_copy(update={"enabled": False})}), WITHOUT_TEXT


def _is_cut(request: dict[str, Any], config: OptimizationConfig, limit: int) -> bool:
    text, language = request["text"], request.get("language_id")
    if fits(text, language, limit) and not config.text.normalize:
        return False
    return len(list(pieces([text], language, splitting=splitting_of(config.text)))) > 1
