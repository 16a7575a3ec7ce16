"""``model.turbo``: the one attribute added to a model, applying a configuration and taking it back."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from . import entry_points
from .budget.fitting import fit
from .budget.measurement import beside, slots_within, taken
from .config import OptimizationConfig
from .entry_points import EntryPoints, lock_of
from .errors import (
    ForeignPatchError,
    ForeignPatchWarning,
    OriginalsDiscardedWarning,
    TurboError,
    UnavailablePassError,
)
from .instruments import install_recorder
from .memory import Usage, holdings, usage, weights
from .passes.base import Context, Engines, Pass, in_force
from .patching import BoundToModel, Journal, Loss
from .plan import Plan, build_plan, carry_out
from .report import Report
from .runtime import forks
from .runtime.device.captures import computing
from .runtime.device.surroundings import lasting, plain
from .runtime.device.tf32 import convolves_in_tf32
from .speech.long_text import LongText
from .speech.pipeline import Pipeline
from .speech.speaker import Speaker
from .speech.stream import warm_up
from .speech.voices import Voices
from .upstream import flow_inputs, stages, t3_quantization
from .upstream.families import Parts, identify
from .upstream.parameters import made_in_inference_mode
from .upstream.structure import Structure

logger = logging.getLogger(__name__)

ATTRIBUTE = "turbo"
CONVOLUTIONS = (
    "PyTorch computes convolutions in TF32 on this GPU, its default: numerical then is about 53 dB, which is what "
    "upstream has to itself; 60 dB where torch.backends.cudnn.allow_tf32 = False"
)


class Handle(Speaker, BoundToModel):
    """What is on, what it costs, and how to get rid of it.

    Attributes:
        voices: voices by name, and the encoded recordings that are kept (``speech.voices.Voices``). The same object
            for as long as the model is optimized, whatever is applied.
        lock: held during each call of an entry point. Hold it yourself to make several steps one, such as
            seeding and generating: ``with model.turbo.lock: torch.manual_seed(7); model.generate(...)``.
        renewals: what was replaced or patched since ``apply``, each of which had the configuration applied again.
    """

    def __init__(
        self, context: Context, plan: Plan, entry: EntryPoints, before: dict, voices: Voices, unknown: str = ""
    ):
        self._model = weakref.ref(context.parts.model)
        self.journal = context.journal
        self._engines, self._settings = context.engines, context.settings
        self._remarks = context.remarks
        self._caches, self._transfers, self._holdings = context.caches, context.transfers, context.holdings
        self.voices = voices
        self._entry = entry
        self._unknown = unknown
        self._before = before
        self._plan = plan
        self.lock = entry.lock
        self.renewals: tuple[str, ...] = ()
        self._rounded: tuple[Loss, ...] = ()  # by configurations that were here before
        self._base = 0  # bytes in use beside this model, where a budget is measured

    @property
    def plan(self) -> Plan:
        """Every pass, in order, with its status and the reason as they are now."""
        now = {name: remark() for name, remark in self._remarks.items()}
        steps = (replace(step, reason=now.get(step.name, step.reason)) for step in self._plan.steps)
        return replace(self._plan, steps=tuple(steps))

    @property
    def token_model(self) -> Any:
        """T3 as a function from requests to tokens (``passes.token_model.TokenModel``), or ``None``."""
        return self._engines.token_model

    @property
    def config(self) -> OptimizationConfig:
        """The configuration in force."""
        return self._plan.config

    def report(self) -> Report:
        """What runs, what was skipped and why, memory before and now, timings of the last call, voices kept."""
        voices = str(self.voices)
        notes = (CONVOLUTIONS,) if convolves_in_tf32(self._parts().device) else ()
        notes += tuple(f"{change} after apply: applied again" for change in self.renewals)
        notes += (forks.remark(),) if forks.remark() else ()
        if self._unknown:
            notes += (f"generate is not this package's pipeline, and batches are spoken one by one: {self._unknown}",)
        notes += (_rounded(self._rounded),) if self._rounded else ()
        if self.plan.fit is not None:
            notes += self.plan.fit.notes
        now = self.memory()
        return Report(
            self.plan, self._before, now, self.timings(), voices, notes, taken(now, self._base) if self.plan.fit else {}
        )

    def memory(self) -> Usage:
        """What is in memory, what was at most, and how that went: a dict, with a table (``str``) and ``plot(path)``.

        ``memory.Usage`` says what is in it.
        """
        held = holdings(self._parts(), self._engines, self.voices.tensors, self._holdings)
        return usage(self._parts(), held, self._entry.recorder.meter, self._caches.tally, self._transfers)

    def timings(self) -> dict[str, float]:
        """Seconds by phase of the last ``generate``; empty before the first one."""
        return self._entry.recorder.timer.seconds()

    @property
    def _pipeline(self) -> Pipeline | None:
        return self._entry.pipeline  # nothing of it stays with who keeps a handle of a configuration that is gone

    @contextmanager
    def _working(self, name: str, look: bool = True) -> Iterator[Handle]:
        """The model for the body, as it is now: its lock, its surroundings, its settings. Yields its handle.

        ``look``: whether anybody has changed the model; without, it is taken for what it was.
        """
        with self.lock:
            if look:
                self._entry.refresh()
            parts, now = self._parts(), handle_of(self._parts().model)
            if now is None:
                raise UnavailablePassError("This configuration has been reverted.", "", "Apply it again.")
            # what a batch puts in place for a while is no change of the model
            meter = now._entry.recorder.meter
            with (
                now._entry.inside(look=False),
                computing(parts.device),
                plain(),
                meter.request(name),
                in_force(now._settings),
                meter.phase(name),
            ):
                yield now

    def revert(self) -> Any:
        """Put the model back; the same as ``chatterbox_turbo.revert(model)``."""
        return revert(self._parts().model)

    def belongs_to(self, model: Any) -> bool:
        """Whether this is the handle of that very object."""
        return self._model() is model

    def retire(self) -> None:
        """Let go of what passes have made, and with it of the model's parts; the plan keeps the remarks as they are."""
        self._plan, self._remarks = self.plan, {}
        self._engines, self._settings = Engines(), []

    def _parts(self) -> Parts:
        model = self._model()
        if model is None:
            raise ReferenceError("The model of this handle is gone.")
        return identify(model)


def handle_of(model: Any) -> Handle | None:
    """The handle of an optimized model, or ``None``; also where an app has overwritten or deleted ``model.turbo``.

    Raises:
        ForeignPatchError: the model is a shallow copy of an optimized one, whose patches work on the original; or it
            is not optimized, and has an attribute of that name which is not this package's.
    """
    handle = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    if not isinstance(handle, Handle):
        guards = entry_points.behind(model)
        handle = None if guards is None else guards.handle
    if handle is None:
        if hasattr(model, ATTRIBUTE):
            raise ForeignPatchError(
                f"The model has an attribute {ATTRIBUTE!r} already.",
                "It is not this package's.",
                "Remove or rename it.",
            )
        return None
    if handle.belongs_to(model):
        return handle
    raise ForeignPatchError(
        "This model is a copy of an optimized one.",
        "Its patches belong to the original, which the copy's `generate` would run on.",
        "Revert the original before copying it, and apply to each.",
    )


def revert(model: Any) -> Any:
    """Put a model back exactly as it was before ``apply``; nothing happens to one that is not optimized.

    Where somebody has wrapped an entry point or the watermarker since ``apply``, that stays, and what is below it does
    nothing any more.

    Raises:
        ForeignPatchError: somebody patched on top of something else; nothing has been undone.
        TurboError: memory ran out while weights were restored; nothing has been undone.

    Warns:
        ForeignPatchWarning: something was left below somebody's patch.
        OriginalsDiscardedWarning: the configuration had let go of original weights, or T3 was quantized before it was
            applied; the model has rounded ones.
    """
    if handle_of(model) is None:
        return model
    with lock_of(model), lasting(made_in_inference_mode(model)):
        handle = handle_of(model)
        left = handle.journal.undo() if handle else []
        lost = handle.journal.losses if handle else []
        found = t3_quantization.schemes(getattr(model, "t3", None))
        kept = [scheme for scheme in found if not any(scheme in loss.what for loss in lost)]
    _tell(left, lost, kept)
    return model


def _rounded(losses: Sequence[Loss]) -> str:
    return (
        f"weights are rounded where an earlier configuration let the original ones go: "
        f"{', '.join(loss.what for loss in losses)}. Every promise, exact included, is against these; load the model "
        "again (chatterbox_turbo.load, from_pretrained) for the original ones"
    )


def _tell(left: Sequence[str], lost: Sequence[Loss], kept: Sequence[str] = ()) -> None:
    if kept:
        message = (
            f"T3 stays {', '.join(kept)}, as it was before the configuration was applied: it is of a quantized "
            "checkpoint, or an earlier configuration let the originals go. Load the original checkpoint for them."
        )
        warnings.warn(message, OriginalsDiscardedWarning, stacklevel=3)
    if lost:
        text = _rounded(lost)
        warnings.warn(f"{text[0].upper()}{text[1:]}.", OriginalsDiscardedWarning, stacklevel=3)
    if left:
        message = (
            f"Somebody else's patch was left on {', '.join(left)}. What this package had put below it does nothing "
        )
        warnings.warn(message + "any more.", ForeignPatchWarning, stacklevel=3)


def refresh(model: Any) -> None:
    """Apply the configuration again now, where the next call would: a part was replaced or a function patched since.

    Raises:
        TurboError: it cannot be applied to what the model is now.
    """
    if handle_of(model) is not None:
        with lock_of(model):
            handle_of(model)._entry.refresh()


def put(model: Any, config: OptimizationConfig, passes: Sequence[Pass], told: bool = True) -> Handle:
    """Plan a configuration, take back what is applied, and apply it; all of it, or nothing.

    Args:
        passes: all of them, in order.
        told: warn of what is left below somebody's patch, and of weights that are rounded now; of a configuration that
            is applied by then, also where warnings are errors.

    Raises: as ``apply``; the model is as it was then.
    """
    parts = identify(model)
    with lock_of(model), lasting(made_in_inference_mode(model)):
        old = handle_of(model)
        # the old journal tells own patches from foreign ones; what fits, only the original weights tell
        plan = build_plan(Context(parts, config, old.journal if old else Journal()), passes)
        left = old.journal.undo() if old else []
        try:
            plan = fit(plan, identify(model), config, Journal(), passes)
            new = install(Context(identify(model), plan.config), plan, old and old.voices)
        except BaseException:
            _go_back(model, old)
            raise
        lost = []
        if old:
            again = [loss.what for loss in new.journal.losses]  # the same bits as before
            lost = [loss for loss in old.journal.losses if loss.what not in again]
            new._rounded = tuple(loss for loss in (*old._rounded, *lost) if _is_part(loss.owner(), new._parts()))
        if told:
            _tell(left, lost)
        return new


def _go_back(model: Any, old: Handle | None) -> None:
    """Take back what is on a model after a failure, and have the configuration of before on it again."""
    begun = handle_of(model)
    if begun:  # interrupted once it was complete: some of the original weights may be gone
        begun.journal.undo(insist=True)
    if old:
        again = install(Context(identify(model), old.config), old.plan, old.voices)
        known = [loss.what for loss in again.journal.losses]
        lost = begun.journal.losses if begun else []
        again._rounded = (*old._rounded, *(loss for loss in lost if loss.what not in known))


def _is_part(module: Any, parts: Parts) -> bool:
    return module is not None and any(module is one for part in parts.modules().values() for one in part.modules())


def install(context: Context, plan: Plan, voices: Voices | None = None) -> Handle:
    """Guard the entry points, carry the plan out, add the handle; all of it in ``context.journal``, or nothing.

    ``voices``: those that are kept of the configuration before.
    """
    forks.prepare()
    parts, journal = context.parts, context.journal
    before = weights(parts)
    try:
        entry = EntryPoints(
            parts.model,
            lambda change: _renew(entry.handle, change),
            context.arguments,
            context.scopes,
            context.settings,
            context.entry_points,
            context.retries,
        )
        # before guards and passes lie over what others have put there
        unknown, alone = stages.why_not(parts, journal), flow_inputs.why_not(parts, journal)
        entry.wrap_all(journal)
        plan = carry_out(plan, context)
        voices = voices or Voices(parts.model, entry.lock)
        scopes = tuple(context.scopes)
        context.scopes.insert(0, voices.scope)  # before the others see its argument
        if not unknown:
            slots = slots_within(context.config, None)
            pipeline = Pipeline(
                parts, stages.stages(parts), context.engines, voices.chosen, context.arguments, scopes, alone, slots
            )
            entry.pipeline = pipeline
            entry.speak = pipeline.generate if context.engines.text is None else LongText(pipeline).generate
            # with offload a part is there in its phase only
            if context.config.warmup.level == "full" and {"warmup", "offload"} & set(context.applied) == {"warmup"}:
                with computing(parts.device), plain(), in_force(context.settings):
                    warm_up(pipeline)
        # last, so that it sees what the passes put there
        entry.recorder = install_recorder(parts, journal, context.config.memory.peaks)
        entry.handle = Handle(context, plan, entry, before, voices, unknown)
        journal.record("handle", entry.handle.retire)
        journal.set(parts.model, ATTRIBUTE, entry.handle, yields=True)
        entry.structure = Structure(parts, journal, context.reproduced, context.movable)
        voices.attach(context.voices, plan.config.conditioning.voices_bytes, lambda: not entry.retired)
        if plan.fit is not None:
            entry.handle._base = beside(parts, entry.handle.memory())
    except BaseException:
        journal.undo(insist=True)
        raise
    journal.complete()  # last, for what it lets go of does not come back
    return entry.handle


def _renew(handle: Handle, change: str) -> None:
    """Apply the configuration of a handle again, because its model is made of something else now."""
    model = handle._parts().model
    logger.warning("%s after apply: the configuration is applied again.", change)
    try:
        new = put(model, handle.plan.request, handle.plan.passes, told=False)
    except TurboError as error:
        raise type(error)(
            f"{change} after apply, and the configuration cannot be applied again.",
            str(error),
            "Put it back, or call chatterbox_turbo.revert(model) and apply another configuration.",
        ) from error
    new.renewals = (*handle.renewals, change)
