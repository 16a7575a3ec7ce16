"""What a pass is, and what it is given."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..config import Fidelity, OptimizationConfig, Section
from ..patching import Journal
from ..runtime.device.attention_kernels import Wanted
from ..runtime.device.surroundings import plain
from ..runtime.device.transfers import Transfers
from ..runtime.memory.clearing import CachePolicy
from ..runtime.voice.cache import VoiceCache
from ..upstream.families import FAMILIES, Parts
from ..upstream.prepared import Prepared


@dataclass
class Call:
    """One call of ``generate`` as a scope sees it; ``result`` is set once upstream has returned."""

    args: tuple
    kwargs: dict[str, Any]
    result: Any = None

    def rewrite(self, names: Sequence[str], change: Callable[[str, Any], Any]) -> None:
        """Replace each argument by ``change(name, value)``; ``names``: of the positional ones, in order."""
        rest = self.args[len(names) :]
        self.args = (*(change(name, value) for name, value in zip(names, self.args, strict=False)), *rest)
        self.kwargs = {name: change(name, value) for name, value in self.kwargs.items()}


def parameters(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a bound method takes, in order."""
    return tuple(inspect.signature(method).parameters)


Scope = Callable[[Call], AbstractContextManager]
Setting = Callable[[], AbstractContextManager]


@contextmanager
def in_force(settings: Sequence[Setting]) -> Iterator[None]:
    """All of them around the body, the first outermost."""
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting())
        yield


Arguments = tuple[tuple, dict[str, Any]]  # of a call: positional, by name


class Switch:
    """Calls of one of upstream's functions: they go to ``function``, or while their thread diverts them, elsewhere."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._thread = threading.local()  # a thread that another one forks away from takes its handler with it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with plain():  # some call T3 or the acoustic half without the model's entry points
            return (getattr(self._thread, "handler", None) or self._function)(*args, **kwargs)

    @property
    def diverting(self) -> bool:
        """Whether this thread's calls go elsewhere."""
        return getattr(self._thread, "handler", None) is not None

    @contextmanager
    def diverted(self, handler: Callable[..., Any]) -> Iterator[None]:
        """In the body, ``handler`` gets the arguments and returns the result."""
        before, self._thread.handler = getattr(self._thread, "handler", None), handler
        try:
            yield
        finally:
            self._thread.handler = before


@dataclass
class Engines:
    """What computes whole batches, once passes have put it in place.

    Attributes:
        token_model: T3 as a function from requests to tokens (``passes.token_model.TokenModel``).
        flow: tokens to mel frames (``passes.flow.Flow``).
        vocoder: mel frames to samples (``passes.vocoder.Vocoder``).
        text: how long texts are cut (``config.TextSection``).
    """

    token_model: Any = None
    flow: Any = None
    vocoder: Any = None
    text: Any = None


@dataclass
class Context:
    """The model that a pass works on, and the only ways in which it may change it.

    Attributes:
        journal: for every write; one that cannot be undone to the bit once memory has been saved: ``give_up`` there.
        arguments: each gets name and value of every argument of a request and returns what is to be in its place,
            before anything else is done.
        scopes: what surrounds each ``generate`` (under the model's lock): a scope may rewrite the arguments before
            its ``yield``, and replace ``call.result`` after it. Around an utterance of a batch it is what completes it.
        settings: what is process-wide and rules whatever the model computes: calls, batches, a warm-up.
        around: by part (``t3``, ``flow``), what surrounds the work of its engine, where everything else is in plain
            surroundings; the engine then computes by torch's own operations, which heed it.
        applied, planned: names of the passes carried out so far, and of those that are to run.
        engines: what passes have put in place for batches.
        entry_points: what runs in place of one of upstream's (by name, except ``generate``), with its arguments and
            under the model's lock.
        voices: encoded voices, once a pass keeps them.
        remarks: by a pass's name, its remark for the report as it is now, where that may change after ``apply``.
        attention: by part (``prefill``, ``flow``, ``encoder``), the kernel that is wanted, for whoever builds it;
            without an entry the part chooses.
        reproduced: (namespace, name) pairs of functions outside the model that a pass reproduces: where one is patched
            later, the configuration is applied again.
        caches: when memory that nobody uses is given back; never, unless the memory pass runs.
        transfers: a record of what passes move between devices.
        holdings: objects that hold tensors of their own beside the model's, by a name for the table of the memory. What
            is in ``engines`` and ``voices`` is there anyway.
        prepared: by a pass's name, what it has made of weights.
        movable: ids of parameters and buffers whose device changes while the model works.
        retries: asked when ``generate`` has failed: whether it is called once more.
    """

    parts: Parts
    config: OptimizationConfig
    journal: Journal = field(default_factory=Journal)
    arguments: list[Callable[[str, Any], Any]] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    around: dict[str, Setting] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)
    engines: Engines = field(default_factory=Engines)
    entry_points: dict[str, Callable[..., Any]] = field(default_factory=dict)
    voices: VoiceCache | None = None
    remarks: dict[str, Callable[[], str]] = field(default_factory=dict)
    attention: dict[str, Wanted] = field(default_factory=dict)
    reproduced: list[tuple[Any, str]] = field(default_factory=list)
    caches: CachePolicy = field(default_factory=CachePolicy)
    transfers: Transfers = field(default_factory=Transfers)
    # weak: whoever keeps the handle of a model that was reverted keeps nothing that passes have made
    holdings: weakref.WeakValueDictionary[str, Any] = field(default_factory=weakref.WeakValueDictionary)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    movable: set[int] = field(default_factory=set)
    retries: list[Callable[[Exception], bool]] = field(default_factory=list)


class Pass:
    """One optimization. Subclass it, set the attributes, write ``apply`` (and ``check`` where it may not fit).

    Attributes:
        name: unique; a pass of this package has a section of the same name in ``OptimizationConfig``.
        summary: one line for tables.
        families: where it applies.
        patch_points: dotted paths that must have their known shape (``upstream.patch_points``).
        replaces: those of them whose code the pass replaces, so that it must be a known one.
        conflicts: names of passes that it cannot be combined with.
        needs: names of passes without which it changes nothing, or cannot run; decided before it, so that ``check``
            finds in ``context.planned`` which of them run.
    """

    name: str = ""
    summary: str = ""
    families: tuple[str, ...] = FAMILIES
    patch_points: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def section(self, config: OptimizationConfig) -> Section:
        """The options of this pass; a pass from outside the package has no section and is demanded by being passed."""
        own = getattr(config, self.name, None)  # or a method, or an option, that is called like the pass
        return own if isinstance(own, Section) else Section(enabled=True)

    def idle(self, context: Context) -> str:
        """Why these options ask for nothing, or an empty string where they ask for something."""
        return self.section(context.config).idle

    def fidelity(self, context: Context) -> Fidelity:
        """The promise that this pass makes under these options, on this model's device."""
        return self.section(context.config).promise

    def check(self, context: Context) -> str:
        """Why the pass cannot run on this model and machine, or an empty string. Changes nothing."""
        return ""

    def apply(self, context: Context) -> str:
        """Carry the pass out through ``context``; returns a remark for the report, or an empty string."""
        raise NotImplementedError(f"{type(self).__name__} does not define apply")
