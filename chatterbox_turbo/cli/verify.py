"""``verify``: whether each pass keeps its promise on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .bench import on_gpu, print_findings, samples
from .loading import Loaded, Wanted, load_model, request_for, why_unavailable
from .machine import provenance, summary
from .options import ModelName
from .screen import Screen, table

if TYPE_CHECKING:
    from ..config import OptimizationConfig
    from ..measure.gpu import Findings
    from ..passes.base import Pass

TEXTS = (
    options.TEXT,
    "Is it one, or two? It is three!",
    "Yes.",
    "On the 3rd of May, at half past seven, Dr. Smith paid $4.50 for a cup of tea.",
)
TOGETHER = "all together"


@dataclass(frozen=True)
class Outcome:
    """One pass alone (or all together) against upstream: the worst figures over all requests and seeds.

    ``verdict``: kept, broken, measured (lossy: the figures are the promise) or skipped; ``detail`` says why.
    """

    family: str
    name: str
    promise: str
    verdict: str
    detail: str = ""
    token_agreement: float | None = None
    snr_db: float | None = None
    watermarked: bool | None = None


def verify(
    context: typer.Context,
    model: Annotated[
        list[ModelName] | None, typer.Option("--model", help="Repeatable; all that upstream has where left out.")
    ] = None,
    size: options.SizeByWeights = None,
    checkpoint: options.Checkpoint = None,
    real: Annotated[bool, typer.Option("--real", help="Real weights, where they are or can be had.")] = False,
    texts: Annotated[int, typer.Option("--texts", min=1, max=len(TEXTS), help="Number of texts.")] = 2,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds.")] = 1,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    json: options.Json = None,
) -> None:
    """Check that every pass keeps its promise.

    Each enabled pass alone, then all together, against upstream. On CUDA also what only a GPU can tell: graphs, waits,
    tokens a second. Exit code 1 if a promise is broken. Of a --checkpoint whose T3 is quantized, upstream's own code is
    what computes with these weights.
    """
    screen = options.screen_of(context)
    if real and checkpoint:
        raise typer.BadParameter("give either --real or --checkpoint.")
    if checkpoint and model and len(model) > 1:
        raise typer.BadParameter("a --checkpoint is of one model: give --model once.")
    if json not in (None, "-"):
        options.check_writable(Path(json))
    with screen.step("importing chatterbox-tts"), screen.quiet():
        if checkpoint and not model:
            from ..upstream.loading import family_in

            families = [family_in(checkpoint)]
        else:
            families = [name.value for name in model or ModelName if model or not why_unavailable(name.value)]
    settings = options.configuration(screen, preset, config)
    outcomes: list[Outcome] = []
    models: dict[str, str] = {}
    gpus: list[Findings] = []
    for family in families:
        wanted = Wanted(
            family,
            options.device_named(device),
            options.size_for(size, checkpoint),
            synthetic=not (real or checkpoint),
            checkpoint=checkpoint,
        )
        loaded = load_model(screen, wanted)
        models[family] = loaded.description
        outcomes += _carry_out(screen, loaded, settings, TEXTS[:texts], range(seeds))
        gpus += on_gpu(screen, loaded.model, settings, request_for(loaded.model, TEXTS[0]))
    broken = [outcome for outcome in outcomes if outcome.verdict == "broken"]
    data = {
        **provenance(screen.arguments),
        "models": models,
        "config": settings.model_dump(),
        "texts": TEXTS[:texts],
        "seeds": seeds,
        "broken": len(broken),
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "gpu": [found.to_dict() for found in gpus],
    }
    if json is not None:
        screen.write_json(data, json)
    if json != "-":
        screen.print(data["command"])
        screen.print(summary(data))
        for family, description in models.items():
            screen.print(f"model: {family}, {description}")
        screen.print()
        screen.print(outcomes_table(outcomes))
        for found in gpus:
            print_findings(screen, found)
        screen.print(f"\n{len(broken)} broken" if broken else "\nevery promise is kept")
    if broken:
        raise typer.Exit(1)


def _carry_out(
    screen: Screen, loaded: Loaded, settings: OptimizationConfig, texts: Sequence[str], seeds: Sequence[int]
) -> list[Outcome]:
    requests = [request_for(loaded.model, text) for text in texts]
    if "audio" in requests[0]:
        requests = requests[:1]  # voice conversion takes no text
    with screen.step("comparing"), screen.quiet():
        return promises(loaded.model, settings, requests, seeds, announce=screen.announce)


def promises(
    model: Any,
    config: OptimizationConfig,
    requests: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    passes: Sequence[Pass] = (),
    announce: Callable[[str], None] = lambda step: None,
) -> list[Outcome]:
    """Upstream once for every request and seed, then each pass that would run alone, then all; model unchanged.

    Args:
        requests: keyword arguments of ``generate``.
        passes: passes from outside the package.
    """
    from ..runtime.device.tf32 import full_precision

    with full_precision():  # convolutions on CUDA use TF32 by default, in which upstream is 53 dB from itself
        return _promises(model, config, requests, seeds, passes, announce)


def _promises(model, config, requests, seeds, passes, announce) -> list[Outcome]:
    from ..api import inspect
    from ..config import FIDELITIES, OptimizationConfig
    from ..measure.fidelity import sample

    plan = inspect(model, config, passes=passes)
    announce(f"{plan.family}: upstream")
    pairs = [(request, seed) for request in requests for seed in seeds]
    references = [sample(model, seed, request) for request, seed in pairs]
    outcomes = []
    for p, step in zip(plan.passes, plan.steps, strict=True):
        if step.status == "skipped":
            outcomes.append(Outcome(plan.family, step.name, step.fidelity, "skipped", step.reason))
        if step.status != "on":
            continue
        announce(f"{plan.family}: {step.name}")
        wanted = (step.name, *p.needs)
        sections = {
            name: section if name in wanted else type(section)(enabled=False) for name, section in config.sections()
        }
        alone = OptimizationConfig(fidelity=config.fidelity, **sections)
        outside = (p,) if p in passes else ()
        outcomes.append(_outcome(model, alone, outside, pairs, references, plan.family, step.name, step.fidelity))
    if plan.running:
        announce(f"{plan.family}: {TOGETHER}")
        weakest = max((plan.step(name).fidelity for name in plan.running), key=FIDELITIES.index)
        outcomes.append(_outcome(model, config, passes, pairs, references, plan.family, TOGETHER, weakest))
    return outcomes


def _outcome(model, config, passes, pairs, references, family, name, promise) -> Outcome:
    from ..api import optimized
    from ..errors import TurboError
    from ..measure.divergence import token_divergence
    from ..measure.fidelity import compare_samples, sample

    try:
        with optimized(model, config, passes=passes):
            ours = [sample(model, seed, request) for request, seed in pairs]
    except TurboError:
        raise
    except Exception as error:  # whatever a pass raises is the finding
        return Outcome(family, name, promise, "broken", f"raises {type(error).__name__}: {error}")
    found = [compare_samples(model, a, b) for a, b in zip(ours, references, strict=True)]
    figures = str(token_divergence(model, config, pairs[0][0])) if config.halves_t3 and name != TOGETHER else ""
    complaints = list(dict.fromkeys(filter(None, (comparison.broken(promise) for comparison in found))))
    return Outcome(
        family,
        name,
        promise,
        "broken" if complaints else "measured" if promise == "lossy" else "kept",
        "; ".join(complaints) or figures,
        min(comparison.token_agreement for comparison in found),
        min(comparison.snr_db for comparison in found),
        all(comparison.watermarked for comparison in found),
    )


def outcomes_table(outcomes: list[Outcome]) -> Any:
    """One row an outcome."""
    rows = table("", "model", "pass", "promise", "tokens", "samples", "watermark", "verdict")
    for column in rows.columns:
        column.justify = "left"
    for o in outcomes:
        figures = ("", "", "")
        if o.snr_db is not None:
            tokens = "" if o.family == "vc" else f"{o.token_agreement:.1%}"
            figures = (tokens, samples(o.snr_db), "detected" if o.watermarked else "missing")
        rows.add_row(o.family, o.name, o.promise, *figures, f"{o.verdict}: {o.detail}" if o.detail else o.verdict)
    return rows
