"""The journal: the one way in which this package writes to objects that it does not own.

A write remembers where the old value lived. Undoing a write to an instance whose attribute came from its
class deletes the instance attribute instead of copying the class's value into it, so that later changes of
the class stay visible (the distinction is the one that wrapt's patching functions make).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import wrapt

from .errors import ForeignPatchError, TurboError, UncopyableModelError, describe

_ABSENT = object()
# nn.Module keeps these three beside its __dict__; setattr picks one by the type of the value.
_MODULE_TABLES = ("_parameters", "_buffers", "_modules")


def _table(owner: Any, name: str) -> dict[str, Any] | None:
    """The dict that holds ``name`` for this very object, or None where its class (or nobody) provides it."""
    attributes = vars(owner)
    for table in (attributes, *(attributes.get(key) for key in _MODULE_TABLES)):
        if isinstance(table, dict) and name in table:
            return table
    return None


def _is_managed(owner: Any, name: str) -> bool:
    """Whether the class decides what setting ``name`` does (a property)."""
    return hasattr(inspect.getattr_static(type(owner), name, None), "__set__")


def _holds(owner: Any, name: str, value: Any) -> bool:
    if not hasattr(owner, "__dict__"):
        return False
    if _is_managed(owner, name):
        return getattr(owner, name, _ABSENT) is value
    table = _table(owner, name)
    return table is not None and table[name] is value


class BoundToModel:
    """What works on one model only: neither it nor what holds it can be copied or pickled."""

    def _refuse(self, *_: Any) -> Any:
        raise UncopyableModelError(
            "An optimized model cannot be copied or pickled.",
            "Its patches belong to this one object.",
            "Revert it first, and apply to the copy.",
        )

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = _refuse


class PatchedMethod(BoundToModel, wrapt.FunctionWrapper):
    """A method of one object with a wrapper around it, until it is made inert."""

    def __init__(self, wrapped: Callable, wrapper: Callable):
        super().__init__(wrapped, wrapper)
        self._self_inert = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._self_inert:
            return self.__wrapped__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def make_inert(self) -> None:
        """From now on, calls go to the method as if there were no wrapper."""
        self._self_inert = True

    @property
    def inert(self) -> bool:
        """Whether ``make_inert`` was called."""
        return self._self_inert


@dataclass
class _Write:
    description: str
    undo: Callable[[], None]
    owner: Any = None
    name: str = ""
    value: Any = _ABSENT
    yields: bool = False
    redo: Callable[[], None] | None = None


@dataclass(frozen=True)
class Loss:
    """Something that undoing does not restore to the bit.

    Attributes:
        what: the part and what it is now, in words.
        owner: a weak reference to the object that it belongs to.
    """

    what: str
    owner: weakref.ref


class Journal:
    """Writes in the order in which they happened, and their undoing in reverse.

    A write that cannot be undone to the bit, because what that needs takes memory (a matrix in another format), comes
    in three steps: it is made and recorded so that undoing restores everything; ``give_up`` names what is to be let go;
    ``complete``, once all passes have been applied, lets it go. So a failing ``apply`` still leaves no trace.

    Attributes:
        losses: what undoing does not restore, or has not restored, to the bit.
    """

    def __init__(self) -> None:
        self._writes: list[_Write] = []
        self._given_up: list[tuple[Loss, Callable[[], None]]] = []
        self.losses: list[Loss] = []

    def __len__(self) -> int:
        return len(self._writes)

    def __iter__(self):
        return (write.description for write in self._writes)

    def set(self, owner: Any, name: str, value: Any, yields: bool = False) -> None:
        """Set ``owner.name``; undoing restores the old value, or deletes the name if the object had none.

        ``yields``: where somebody has put something else there meanwhile, or taken it away, undoing leaves that.

        Raises:
            TurboError: the object has no instance attributes (``__slots__``), so the write cannot be undone; or it
                refuses the write (a property without a setter, a ``__setattr__`` of its own).
        """
        if not hasattr(owner, "__dict__"):
            raise TurboError(
                f"Cannot patch {name!r} of a {type(owner).__name__}.",
                "The object has no instance dictionary, so a write could not be undone.",
            )
        table, managed = _table(owner, name), _is_managed(owner, name)
        old = getattr(owner, name) if managed else _ABSENT if table is None else table[name]

        def undo() -> None:
            if yields and not _holds(owner, name, value):
                return
            if managed:
                setattr(owner, name, old)
            elif old is _ABSENT:
                delattr(owner, name)
            else:
                table[name] = old  # type: ignore[index]

        try:
            setattr(owner, name, value)
        except Exception as error:
            raise TurboError(
                f"Cannot set {name!r} of a {type(owner).__name__}.",
                f"The object refuses it ({describe(error)}).",
                "Make it an attribute that can be set, or leave out what sets it.",
            ) from error
        self._writes.append(_Write(f"{type(owner).__name__}.{name}", undo, owner, name, value, yields))

    def wrap(self, owner: Any, name: str, wrapper: Callable[[Callable, Any, tuple, dict], Any]) -> None:
        """Put ``wrapper(wrapped, instance, args, kwargs)`` around a method of this one object.

        Signature, name and docstring stay those of the wrapped method (wrapt).
        """
        wrapped = getattr(owner, name, None)
        if not callable(wrapped):
            raise TurboError(f"Cannot wrap {type(owner).__name__}.{name}.", "It is missing or not callable.")
        self.set(owner, name, PatchedMethod(wrapped, wrapper))

    def record(self, description: str, undo: Callable[[], None], redo: Callable[[], None] | None = None) -> None:
        """Note a change that is not an attribute (a hook, a process-wide switch), before making it.

        ``undo`` must also be right where the change was not made, because something failed in between.

        ``redo``: makes the change again after ``undo``. It is for changes whose undoing needs memory that may not be
        there (weights in their old format). They are undone before all others, each of them whole or not at all, and
        where one fails, those before it are made again.
        """
        self._writes.append(_Write(description, undo, redo=redo))

    def give_up(self, what: str, owner: Any, release: Callable[[], None]) -> None:
        """Have ``release`` called by ``complete``: it lets go of what undoing a recorded write to the bit needs.

        From then on that write's ``undo`` restores what is left.

        Args:
            what: for the user: which part, and what its weights will be.
            owner: the module that they belong to; held weakly.
        """
        self._given_up.append((Loss(what, weakref.ref(owner)), release))

    def keep(self, owner: Any, name: str) -> None:
        """Forget a write: what it put there stays, and what was there before is let go of."""
        self._writes = [write for write in self._writes if not (write.owner is owner and write.name == name)]

    def complete(self) -> None:
        """Everything has been applied: let go of what was given up."""
        while self._given_up:
            loss, release = self._given_up.pop(0)
            self.lose(loss)
            release()

    def lose(self, loss: Loss) -> None:
        """Note that something will not be restored to the bit."""
        if loss not in self.losses:
            self.losses.append(loss)

    def owns(self, owner: Any, name: str) -> bool:
        """Whether the value that ``owner.name`` has now was written by this journal."""
        return any(w.owner is owner and w.name == name and _holds(owner, name, w.value) for w in self._writes)

    def undo(self, insist: bool = False) -> list[str]:
        """Undo every write, those that can be redone first, the others last one first; and leave the journal empty.

        Args:
            insist: go on with the rest where a write that can be redone cannot be undone; for an ``apply`` that
                failed halfway, after which there is nothing to stay with.

        What somebody else has put on top of a write stays there. What this package wrote below it is made inert, where
        its type has ``make_inert``: the methods and the watermarker that others like to wrap.

        Returns:
            Descriptions of what was left below somebody else's patch.

        Raises:
            ForeignPatchError: somebody patched on top of a write that cannot be made inert; nothing has been undone.
            TurboError: a write that can be redone could not be undone, and nothing has been undone; or another undo
                failed, and the remaining ones were carried out all the same.
        """
        buried = {id(w): w for w in self._writes if w.value is not _ABSENT and not self.owns(w.owner, w.name)}
        inert = {key for key, write in buried.items() if hasattr(type(write.value), "make_inert")}
        for key, write in buried.items():
            if key not in inert and not write.yields:
                raise ForeignPatchError(
                    f"Cannot revert {write.description}: it no longer holds what this package put there.",
                    "Another patch was applied on top of it (or removed it).",
                    "Remove that patch first, then revert again.",
                )
        failures = self._undo_costly(insist)
        while self._writes:
            write = self._writes.pop()
            try:
                write.value.make_inert() if id(write) in inert else write.undo()
            except Exception as error:  # the other writes must still be undone
                failures.append(f"{write.description} ({type(error).__name__}: {error})")
        self._given_up.clear()
        if failures:
            raise TurboError(
                f"Could not undo {', '.join(failures)}.",
                "Everything else was put back.",
                "Load the model again to be sure of its state.",
            )
        return list(dict.fromkeys(buried[key].description for key in inert))

    def _undo_costly(self, insist: bool) -> list[str]:
        """Undo, and take out of the journal, what can be redone: all of it, or nothing unless ``insist``; failures."""
        costly = [write for write in reversed(self._writes) if write.redo is not None]
        failures = []
        for number, write in enumerate(costly):
            try:
                write.undo()
            except BaseException as error:
                if isinstance(error, Exception) and insist:
                    failures.append(f"{write.description} ({describe(error)})")
                    continue
                for done in reversed(costly[:number]):
                    done.redo()
                if not isinstance(error, Exception):
                    raise
                raise TurboError(
                    f"Cannot revert: undoing the {write.description} failed ({describe(error)}).",
                    "Nothing has been undone, and the model goes on as it was; that step needs memory.",
                    "Free some (other models, torch.cuda.empty_cache()) and revert again, or load the model again.",
                ) from error
        self._writes = [write for write in self._writes if write.redo is None]
        return failures
