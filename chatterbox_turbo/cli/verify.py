"""``verify``: whether each pass keeps its promise on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import describe
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


@dataclass
class Found:
    """Of all families so far: weights by family, outcomes, what only a GPU can tell, notes, and what went wrong."""

    models: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    gpus: list[Findings] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: dict[str, BaseException] = field(default_factory=dict)

    @property
    def broken(self) -> list[Outcome]:
        """Promises that are."""
        return [outcome for outcome in self.outcomes if outcome.verdict == "broken"]


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
    found = Found()
    for family in families:
        wanted = Wanted(
            family,
            options.device_named(device),
            options.size_for(size, checkpoint),
            synthetic=not (real or checkpoint),
            checkpoint=checkpoint,
        )
        try:
            loaded = load_model(screen, wanted)
            found.models[family] = loaded.description
            _carry_out(screen, loaded, settings, TEXTS[:texts], range(seeds), found)
            found.gpus += on_gpu(screen, loaded.model, settings, request_for(loaded.model, TEXTS[0]))
        except (Exception, KeyboardInterrupt) as error:  # what was found of others is not lost
            found.failures[family] = error
            if isinstance(error, KeyboardInterrupt):
                break
    if found.outcomes:
        _show(screen, found, settings, TEXTS[:texts], seeds, json)
    *others, last = [None, *found.failures.items()]
    for family, error in filter(None, others):
        screen.error(f"{family}: {error}")
    if last is not None:
        raise last[1]
    if found.broken:
        raise typer.Exit(1)


def _show(
    screen: Screen, found: Found, settings: OptimizationConfig, texts: Sequence[str], seeds: int, json: str | None
) -> None:
    broken, models = found.broken, found.models
    data = {
        **provenance(screen.arguments),
        "models": models,
        "config": settings.model_dump(),
        "texts": texts,
        "seeds": seeds,
        "broken": len(broken),
        "outcomes": [asdict(outcome) for outcome in found.outcomes],
        "notes": found.notes,
        "failures": {family: describe(error) for family, error in found.failures.items()},
        "gpu": [one.to_dict() for one in found.gpus],
    }
    if json is not None:
        screen.write_json(data, json)
    if json == "-":
        return
    screen.print(data["command"])
    screen.print(summary(data))
    for family, description in models.items():
        screen.print(f"model: {family}, {description}")
    screen.print()
    screen.print(outcomes_table(found.outcomes))
    for note in found.notes:
        screen.print(f"note: {note}")
    for one in found.gpus:
        print_findings(screen, one)
    if broken:
        screen.print(f"\n{len(broken)} broken")
    elif found.failures:
        screen.print(f"\nno promise is broken, but not everything was looked at: {', '.join(found.failures)}")
    else:
        screen.print("\nevery promise is kept")


def _carry_out(
    screen: Screen,
    loaded: Loaded,
    settings: OptimizationConfig,
    texts: Sequence[str],
    seeds: Sequence[int],
    found: Found,
) -> None:
    requests = [request_for(loaded.model, text) for text in texts]
    if "audio" in requests[0]:
        requests = requests[:1]  # voice conversion takes no text

    def note(line: str) -> None:
        found.notes += [] if line in found.notes else [line]

    with screen.step("comparing"), screen.quiet():
        for outcome in promises(loaded.model, settings, requests, seeds, announce=screen.announce, note=note):
            found.outcomes.append(outcome)  # each at once: the next one may raise


def promises(
    model: Any,
    config: OptimizationConfig,
    requests: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    passes: Sequence[Pass] = (),
    announce: Callable[[str], None] = lambda step: None,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[Outcome]:
    """Upstream once for every request and seed, then each pass that would run alone, then all; model unchanged.

    Args:
        requests: keyword arguments of ``generate``.
        passes: passes from outside the package.
        note: called with how what is compared differs from the configuration, and why (``measure.beside``).
    """
    from ..api import inspect
    from ..measure.beside import beside_upstream
    from ..runtime.device.tf32 import full_precision

    chosen = beside_upstream(model, config, requests, passes)
    plan = inspect(model, chosen.config, passes=passes)
    for line in chosen.notes:
        note(f"{plan.family}: {line}")
    with full_precision():  # convolutions on CUDA use TF32 by default, in which upstream is 53 dB from itself
        yield from _promises(model, plan, requests, seeds, passes, announce)


def _promises(model, plan, requests, seeds, passes, announce) -> Iterator[Outcome]:
    from ..config import FIDELITIES, OptimizationConfig
    from ..measure.fidelity import sample

    config = plan.config
    announce(f"{plan.family}: upstream")
    pairs = [(request, seed) for request in requests for seed in seeds]
    references = [sample(model, seed, request) for request, seed in pairs]
    for p, step in zip(plan.passes, plan.steps, strict=True):
        if step.status == "skipped":
            yield Outcome(plan.family, step.name, step.fidelity, "skipped", step.reason)
        if step.status != "on":
            continue
        announce(f"{plan.family}: {step.name}")
        wanted = (step.name, *p.needs)
        sections = {
            name: section if name in wanted else type(section)(enabled=False) for name, section in config.sections()
        }
        alone = OptimizationConfig(fidelity=config.fidelity, **sections)
        outside = (p,) if p in passes else ()
        yield _outcome(model, alone, outside, pairs, references, plan, step.name, step.fidelity)
    if plan.running:
        announce(f"{plan.family}: {TOGETHER}")
        weakest = max((plan.step(name).fidelity for name in plan.running), key=FIDELITIES.index)
        yield _outcome(model, config, passes, pairs, references, plan, TOGETHER, weakest)


def _outcome(model, config, passes, pairs, references, plan, name, promise) -> Outcome:
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
        return Outcome(plan.family, name, promise, "broken", f"raises {type(error).__name__}: {error}")
    found = [compare_samples(model, a, b) for a, b in zip(ours, references, strict=True)]
    decoded = plan.step("decoding").status == "on"  # not by a model without T3
    halved = decoded and "t3" in config.halved and name != TOGETHER
    figures = str(token_divergence(model, config, pairs[0][0])) if halved else ""
    complaints = list(dict.fromkeys(filter(None, (comparison.broken(promise) for comparison in found))))
    return Outcome(
        plan.family,
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
