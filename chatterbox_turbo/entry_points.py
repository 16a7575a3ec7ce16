"""The entry points of a model under guard: its lock, what surrounds a call, and a look at what the model is made of."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from .instruments import Recorder
from .passes.base import Call, Scope, Setting, in_force, parameters
from .patching import Journal, PatchedMethod
from .runtime import forks
from .runtime.device.captures import computing
from .runtime.device.surroundings import plain
from .upstream.families import device_of
from .upstream.structure import Structure

NAMES = ("generate", "prepare_conditionals", "set_target_voice")

_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = forks.lock()


def lock_of(model: Any) -> threading.RLock:
    """The lock of a model, the same one for as long as it lives, whatever is applied and reverted meanwhile."""
    with _locks_guard:
        return _locks.setdefault(model, forks.lock())


class EntryPoints:
    """The guards around one model's entry points. One caller at a time: upstream keeps a call's voice on the model.

    Attributes:
        recorder: of phases and tokens, once there is one.
        handle: what stands for the configuration on the model (``handle.Handle``), once it is complete.
        structure: the model as the configuration was applied to it, once it is complete.
        speak: in place of upstream's ``generate``, with its arguments; ``None`` where that runs.
        pipeline: of batches and streams (``speech.pipeline.Pipeline``); ``None`` where upstream's stages are not known.
    """

    def __init__(
        self,
        model: Any,
        renew: Callable[[str], None],
        arguments: list[Callable[[str, Any], Any]],
        scopes: list[Scope],
        settings: list[Setting],
        instead: dict[str, Callable[..., Any]],
        retries: list[Callable[[Exception], bool]],
    ):
        self._model, self._renew, self.lock = weakref.ref(model), renew, lock_of(model)
        self.arguments, self.scopes, self.settings = arguments, scopes, settings
        self.instead, self.retries = instead, retries
        self.recorder: Recorder | None = None
        self.structure: Structure | None = None
        self.handle: Any = None
        self.speak: Callable[..., Any] | None = None
        self.pipeline: Any = None
        self.retired = False
        self._calls = threading.local()  # of a thread that another one forks away from, nothing is left in the child
        # weak: a method keeps its model, and a handle keeps this; who is inside of a call holds the method anyway
        self._methods: dict[str, weakref.ref[PatchedMethod]] = {}
        self._names: tuple[str, ...] = ()  # of what generate takes by position

    def wrap_all(self, journal: Journal) -> None:
        """Put the guards in place."""
        journal.record("entry points", self.retire)
        for name in NAMES:
            if callable(getattr(self._model(), name, None)):
                self._wrap(name, journal)

    def _wrap(self, name: str, journal: Journal) -> None:
        model = self._model()
        if name == "generate":
            self._names = parameters(model.generate)
        journal.wrap(model, name, partial(self._guard_of(name), name))
        self._methods[name] = weakref.ref(vars(model)[name])

    def retire(self) -> None:
        """From now on, calls that have waited for the lock go to what the model has become meanwhile."""
        self.retired = True
        # whoever keeps the handle keeps nothing that passes have made
        self.arguments, self.scopes, self.settings, self.instead, self.retries = [], [], [], {}, []
        self.structure = self.speak = self.pipeline = None

    def refresh(self) -> None:
        """Apply the configuration again where a part was replaced or a function patched since; under the lock.

        Raises:
            TurboError: it cannot be applied to what the model is now.
        """
        if getattr(self._calls, "depth", 0) or self.retired or self.structure is None:
            return
        change = self.structure.change()
        if change:
            self._renew(change)

    def guard(self, name, wrapped, instance, args, kwargs):
        with self.inside(), computing(device_of(self._model())):
            if self.retired:
                return self._onward(name, wrapped)(*args, **kwargs)
            with plain():
                return self.instead.get(name, wrapped)(*args, **kwargs)

    def generate(self, name, wrapped, instance, args, kwargs):
        with self.inside(), computing(device_of(self._model())), ExitStack() as stack:
            if self.retired:
                return self._onward(name, wrapped)(*args, **kwargs)
            stack.enter_context(plain())
            if self.recorder is not None:
                stack.enter_context(self.recorder.meter.request(name))
            stack.enter_context(in_force(self.settings))
            call = Call(args, kwargs)
            for look in self.arguments:
                call.rewrite(self._names, look)
            if self.recorder is not None:
                stack.enter_context(self.recorder.recording())
            for scope in self.scopes:
                stack.enter_context(scope(call))
            call.result = self._result(self.speak or wrapped, call)
            stack.close()  # a scope may replace the result
            return call.result

    def _result(self, wrapped: Callable[..., Any], call: Call) -> Any:
        try:
            return wrapped(*call.args, **call.kwargs)
        except Exception as error:
            if not any(again(error) for again in self.retries):
                raise
        return wrapped(*call.args, **call.kwargs)  # here, where the error no longer holds what its frames held

    def _onward(self, name: str, wrapped: Callable[..., Any]) -> Callable[..., Any]:
        """Where a call goes that has waited: not again through somebody's wrapper that has called this one."""
        model = self._model()
        method = self._methods[name]()
        if method is None or not method.inert:
            return getattr(model, name)
        now = behind(model)  # above that wrapper, where the call has not been
        if now is None:
            return wrapped
        return partial(now._inside_of, name, wrapped)

    def _inside_of(self, name: str, wrapped: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call that got below these guards before they were put there, as if it had passed them."""
        return self._guard_of(name)(name, wrapped, self._model(), args, kwargs)

    def _guard_of(self, name: str) -> Callable[..., Any]:
        return self.generate if name == "generate" else self.guard

    @contextmanager
    def inside(self, look: bool = True) -> Iterator[None]:
        """The model's lock for the body, after a look at its structure; calls in it do not look again."""
        with self.lock:
            if look:
                self.refresh()
            self._calls.depth = getattr(self._calls, "depth", 0) + 1
            try:
                yield
            finally:
                self._calls.depth -= 1


def behind(model: Any) -> EntryPoints | None:
    """The guards that are on a model, or ``None``; an app may have wrapped some of its entry points."""
    for name in NAMES:
        wrapper = getattr(getattr(model, "__dict__", {}).get(name), "_self_wrapper", None)
        found = getattr(getattr(wrapper, "func", None), "__self__", None)
        if isinstance(found, EntryPoints):
            return found
    return None
