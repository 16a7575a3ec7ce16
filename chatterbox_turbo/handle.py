"""``model.turbo``: the one attribute added to a model, and the one way into its entry points."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from .config import OptimizationConfig
from .errors import ForeignPatchError, InvalidRequestError, UnavailablePassError
from .instruments import Recorder, install_recorder, memory
from .passes.base import Call, Context, Scope
from .patching import BoundToModel, Journal, PatchedMethod
from .plan import Plan, carry_out
from .report import Report
from .speech.batch import speak_batch
from .upstream.families import Parts, identify

ENTRY_POINTS = ("generate", "prepare_conditionals", "set_target_voice")
ATTRIBUTE = "turbo"


class Handle(BoundToModel):
    """What is on, what it costs, and how to get rid of it.

    Attributes:
        plan: every pass, in order, with its status and the reason.
        voices: encoded reference voices (``runtime.voice.cache.VoiceCache``: ``len``, ``nbytes``, ``hits``, ``misses``,
            ``clear()``), or ``None`` where the conditioning pass does not run.
        lock: held during each call of an entry point. Hold it yourself to make several steps one, such as
            seeding and generating: ``with model.turbo.lock: torch.manual_seed(7); model.generate(...)``.
    """

    def __init__(self, context: Context, plan: Plan, lock: threading.RLock, recorder: Recorder, before: dict):
        self._model = weakref.ref(context.parts.model)
        self.journal = context.journal
        self._engines = context.engines
        self.voices = context.voices
        self._recorder = recorder
        self._before = before
        self.plan = plan
        self.lock = lock

    @property
    def token_model(self) -> Any:
        """T3 as a function from requests to tokens (``passes.decoding.TokenModel``), or ``None``."""
        return self._engines.token_model

    @property
    def config(self) -> OptimizationConfig:
        """The configuration in force."""
        return self.plan.config

    def report(self) -> Report:
        """What runs, what was skipped and why, memory before and now, timings of the last call, voices kept."""
        voices = "" if self.voices is None else str(self.voices)
        return Report(self.plan, self._before, self.memory(), self.timings(), voices)

    def memory(self) -> dict[str, Any]:
        """Bytes of weights by part and device (``instruments.memory``)."""
        return memory(self._parts())

    def timings(self) -> dict[str, float]:
        """Seconds by phase of the last ``generate``; empty before the first one."""
        return self._recorder.timer.seconds()

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
            return speak_batch(self._parts(), self._engines, items, slots)

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
    """The handle of an optimized model, or ``None``.

    Raises:
        ForeignPatchError: the model is a shallow copy of an optimized one, whose patches work on the original; or it
            has an attribute of that name which is not this package's.
    """
    handle = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    if not isinstance(handle, Handle):
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
    if not hasattr(model, ATTRIBUTE):
        return model
    with lock_of(model):
        handle = handle_of(model)
        if handle:
            handle.journal.undo()
    return model


_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(model: Any) -> threading.RLock:
    """The lock of a model, the same one for as long as it lives, whatever is applied and reverted meanwhile."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


def install(context: Context, plan: Plan) -> Handle:
    """Guard the entry points, carry the plan out, add the handle; all of it in ``context.journal``, or nothing."""
    parts, journal = context.parts, context.journal
    before, lock = memory(parts), lock_of(parts.model)
    try:
        entry = _Entry(parts.model, lock, context.scopes, context.entry_points)
        journal.record("entry points", entry.retire)
        for name in ENTRY_POINTS:
            if callable(getattr(parts.model, name, None)):
                entry.wrap(name, journal)
        plan = carry_out(plan, context)
        entry.recorder = install_recorder(parts, journal)  # last, so that it sees what the passes put there
        handle = Handle(context, plan, lock, entry.recorder, before)
        journal.set(parts.model, ATTRIBUTE, handle)
    except BaseException:
        journal.undo()
        raise
    return handle


class _Entry:
    """One caller at a time: upstream keeps the voice of a call on the model itself."""

    def __init__(self, model: Any, lock: threading.RLock, scopes: list[Scope], instead: dict[str, Callable[..., Any]]):
        self._model = weakref.ref(model)
        self.lock, self.scopes, self.instead = lock, scopes, instead
        self.recorder: Recorder | None = None
        self.retired = False
        self._methods: dict[str, PatchedMethod] = {}

    def wrap(self, name: str, journal: Journal) -> None:
        """Put the guard around an entry point."""
        model = self._model()
        journal.wrap(model, name, partial(self.generate if name == "generate" else self.guard, name))
        self._methods[name] = vars(model)[name]

    def retire(self) -> None:
        """From now on, calls that have waited for the lock go to what the model has become meanwhile."""
        self.retired = True

    def guard(self, name, wrapped, instance, args, kwargs):
        with self.lock:
            if self.retired:
                return self._onward(name, wrapped)(*args, **kwargs)
            return self.instead.get(name, wrapped)(*args, **kwargs)

    def generate(self, name, wrapped, instance, args, kwargs):
        with self.lock, ExitStack() as stack:
            if self.retired:
                return self._onward(name, wrapped)(*args, **kwargs)
            call = Call(args, kwargs)
            if self.recorder is not None:
                stack.enter_context(self.recorder.recording())
            for scope in self.scopes:
                stack.enter_context(scope(call))
            call.result = wrapped(*call.args, **call.kwargs)
            stack.close()  # a scope may replace the result
            return call.result

    def _onward(self, name: str, wrapped: Callable[..., Any]) -> Callable[..., Any]:
        """Where a call goes that has waited: not again through somebody's wrapper that has called this one."""
        return wrapped if self._methods[name].inert else getattr(self._model(), name)
