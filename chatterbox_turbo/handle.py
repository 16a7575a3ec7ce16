"""``model.turbo``: the one attribute added to a model, applying a configuration and taking it back."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import entry_points
from .config import OptimizationConfig
from .entry_points import EntryPoints, lock_of
from .errors import ForeignPatchError, ForeignPatchWarning, InvalidRequestError, TurboError, UnavailablePassError
from .instruments import install_recorder, memory
from .passes.base import Context, Pass, in_force
from .patching import BoundToModel, Journal
from .plan import Plan, build_plan, carry_out
from .report import Report
from .runtime.cpu import forks
from .runtime.device.captures import computing
from .runtime.device.surroundings import lasting, plain
from .runtime.device.tf32 import convolves_in_tf32
from .speech.batch import speak_batch
from .upstream.families import Parts, identify
from .upstream.structure import Structure

logger = logging.getLogger(__name__)

ATTRIBUTE = "turbo"
CONVOLUTIONS = (
    "PyTorch computes convolutions in TF32 on this GPU, its default: numerical then is about 53 dB, which is what "
    "upstream has to itself; 60 dB where torch.backends.cudnn.allow_tf32 = False"
)


class Handle(BoundToModel):
    """What is on, what it costs, and how to get rid of it.

    Attributes:
        voices: encoded reference voices (``runtime.voice.cache.VoiceCache``: ``len``, ``nbytes``, ``hits``, ``misses``,
            ``clear()``), or ``None`` where the conditioning pass does not run.
        lock: held during each call of an entry point. Hold it yourself to make several steps one, such as
            seeding and generating: ``with model.turbo.lock: torch.manual_seed(7); model.generate(...)``.
        renewals: what was replaced or patched since ``apply``, each of which had the configuration applied again.
    """

    def __init__(self, context: Context, plan: Plan, entry: EntryPoints, before: dict):
        self._model = weakref.ref(context.parts.model)
        self.journal = context.journal
        self._engines, self._settings = context.engines, context.settings
        self._remarks = context.remarks
        self.voices = context.voices
        self._entry = entry
        self._before = before
        self._plan = plan
        self.lock = entry.lock
        self.renewals: tuple[str, ...] = ()

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
        voices = "" if self.voices is None else str(self.voices)
        notes = (CONVOLUTIONS,) if convolves_in_tf32(self._parts().device) else ()
        notes += tuple(f"{change} after apply: applied again" for change in self.renewals)
        notes += (forks.remark(),) if forks.remark() else ()
        return Report(self.plan, self._before, self.memory(), self.timings(), voices, notes)

    def memory(self) -> dict[str, Any]:
        """Bytes of weights by part and device (``instruments.memory``)."""
        return memory(self._parts())

    def timings(self) -> dict[str, float]:
        """Seconds by phase of the last ``generate``; empty before the first one."""
        return self._entry.recorder.timer.seconds()

    def batch(self, items: Sequence[Mapping[str, Any]], slots: int | None = None) -> list[Tensor]:
        """Several utterances at once, each as it would be alone with the same seed.

        Tokens are decoded in one batch that utterances enter and leave while it runs. Audio is made in batches of
        similar length (``flow.batch_frames``), or one by one where the passes flow and vocoder do not run.

        Args:
            items: keyword arguments of ``generate``, and optionally ``seed`` (drawn from the global generator where
                it is missing) and ``voice`` (conditionals; the model's own where it is missing).
            slots: utterances decoded at once, which bounds the memory of their caches; all by default.

        Returns:
            Samples (1, m) of each item, in order. The model's own voice and the random generators' states are
            what they were.

        Raises:
            UnavailablePassError: the decoding pass does not run on this model.
            InvalidRequestError: an item has no text or no voice, or ``slots`` is below 1.
        """
        if self.token_model is None:
            raise UnavailablePassError(
                "Batches need the decoding pass.",
                f"On this model it is {self.plan.step('decoding').status}: {self.plan.step('decoding').reason}.",
                "Enable it, or call generate for each item.",
            )
        if slots is not None and slots < 1:
            raise InvalidRequestError(f"slots is {slots}, but must be at least 1.")
        with self.lock:
            self._entry.refresh()
            now = handle_of(self._parts().model) or self  # reverted meanwhile: a batch finds no call and says so
            parts = now._parts()
            # what a batch puts in place for a while is no change of the model
            with now._entry.inside(), computing(parts.device), plain(), in_force(now._settings):
                return speak_batch(parts, now._engines, items, slots)

    def revert(self) -> Any:
        """Put the model back; the same as ``chatterbox_turbo.revert(model)``."""
        return revert(self._parts().model)

    def belongs_to(self, model: Any) -> bool:
        """Whether this is the handle of that very object."""
        return self._model() is model

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

    Warns:
        ForeignPatchWarning: something was left below somebody's patch.
    """
    if handle_of(model) is None:
        return model
    with lock_of(model), lasting():
        handle = handle_of(model)
        left = handle.journal.undo() if handle else []
    _tell(left)
    return model


def _tell(left: Sequence[str]) -> None:
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
        told: warn of what is left below somebody's patch.

    Raises: as ``apply``; the model is as it was then.
    """
    parts = identify(model)
    with lock_of(model), lasting():
        old = handle_of(model)
        # the old journal tells own patches from foreign ones
        plan = build_plan(Context(parts, config, old.journal if old else Journal()), passes)
        left = old.journal.undo() if old else []
        if told:
            _tell(left)
        try:
            return install(Context(identify(model), config), plan)
        except BaseException:
            if old:
                install(Context(identify(model), old.config), old.plan)
            raise


def install(context: Context, plan: Plan) -> Handle:
    """Guard the entry points, carry the plan out, add the handle; all of it in ``context.journal``, or nothing."""
    forks.prepare()
    parts, journal = context.parts, context.journal
    before = memory(parts)
    try:
        entry = EntryPoints(
            parts.model,
            lambda change: _renew(entry.handle, change),
            context.scopes,
            context.settings,
            context.entry_points,
        )
        entry.wrap_all(journal)
        plan = carry_out(plan, context)
        entry.recorder = install_recorder(parts, journal)  # last, so that it sees what the passes put there
        entry.handle = Handle(context, plan, entry, before)
        journal.set(parts.model, ATTRIBUTE, entry.handle, yields=True)
        entry.structure = Structure(parts, journal, context.reproduced)
    except BaseException:
        journal.undo()
        raise
    return entry.handle


def _renew(handle: Handle, change: str) -> None:
    """Apply the configuration of a handle again, because its model is made of something else now."""
    model = handle._parts().model
    logger.warning("%s after apply: the configuration is applied again.", change)
    try:
        new = put(model, handle.config, handle.plan.passes, told=False)
    except TurboError as error:
        raise type(error)(
            f"{change} after apply, and the configuration cannot be applied again.",
            str(error),
            "Put it back, or call chatterbox_turbo.revert(model) and apply another configuration.",
        ) from error
    new.renewals = (*handle.renewals, change)
