"""The journal: the one way in which this package writes to objects that it does not own.

A write remembers where the old value lived. Undoing a write to an instance whose attribute came from its
class deletes the instance attribute instead of copying the class's value into it, so that later changes of
the class stay visible (the distinction is the one that wrapt's patching functions make).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import wrapt

from .errors import ForeignPatchError, ForeignPatchWarning, TurboError, UncopyableModelError

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


class Journal:
    """Writes in the order in which they happened, and their undoing in reverse."""

    def __init__(self) -> None:
        self._writes: list[_Write] = []

    def __len__(self) -> int:
        return len(self._writes)

    def __iter__(self):
        return (write.description for write in self._writes)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name``; undoing restores the old value, or deletes the name if the object had none.

        Raises:
            TurboError: the object has no instance attributes (``__slots__``), so the write cannot be undone.
        """
        if not hasattr(owner, "__dict__"):
            raise TurboError(
                f"Cannot patch {name!r} of a {type(owner).__name__}.",
                "The object has no instance dictionary, so a write could not be undone.",
            )
        table = _table(owner, name)
        old = _ABSENT if table is None else table[name]

        def undo() -> None:
            if old is _ABSENT:
                delattr(owner, name)
            else:
                table[name] = old  # type: ignore[index]

        setattr(owner, name, value)
        self._writes.append(_Write(f"{type(owner).__name__}.{name}", undo, owner, name, value))

    def wrap(self, owner: Any, name: str, wrapper: Callable[[Callable, Any, tuple, dict], Any]) -> None:
        """Put ``wrapper(wrapped, instance, args, kwargs)`` around a method of this one object.

        Signature, name and docstring stay those of the wrapped method (wrapt).
        """
        wrapped = getattr(owner, name, None)
        if not callable(wrapped):
            raise TurboError(f"Cannot wrap {type(owner).__name__}.{name}.", "It is missing or not callable.")
        self.set(owner, name, PatchedMethod(wrapped, wrapper))

    def record(self, description: str, undo: Callable[[], None]) -> None:
        """Note a change that is not an attribute (a hook, a process-wide switch), before making it.

        ``undo`` must also be right where the change was not made, because something failed in between.
        """
        self._writes.append(_Write(description, undo))

    def owns(self, owner: Any, name: str) -> bool:
        """Whether the value that ``owner.name`` has now was written by this journal."""
        table = _table(owner, name) if hasattr(owner, "__dict__") else None
        if table is None:
            return False
        return any(w.owner is owner and w.name == name and w.value is table[name] for w in self._writes)

    def undo(self) -> None:
        """Undo every write, last one first, and leave the journal empty.

        What somebody else has put on top of a write stays there. What this package wrote below it is made inert, where
        its type has ``make_inert``: the methods and the watermarker that others like to wrap.

        Raises:
            ForeignPatchError: somebody patched on top of a write that cannot be made inert; nothing has been undone.
            TurboError: an undo failed; the remaining ones were carried out all the same.

        Warns:
            ForeignPatchWarning: something was left below somebody else's patch.
        """
        buried = {id(w): w for w in self._writes if w.value is not _ABSENT and not self.owns(w.owner, w.name)}
        for write in buried.values():
            if not hasattr(type(write.value), "make_inert"):
                raise ForeignPatchError(
                    f"Cannot revert {write.description}: it no longer holds what this package put there.",
                    "Another patch was applied on top of it (or removed it).",
                    "Remove that patch first, then revert again.",
                )
        failures = []
        while self._writes:
            write = self._writes.pop()
            try:
                write.value.make_inert() if id(write) in buried else write.undo()
            except Exception as error:  # the other writes must still be undone
                failures.append(f"{write.description} ({type(error).__name__}: {error})")
        if failures:
            raise TurboError(
                f"Could not undo {', '.join(failures)}.",
                "Everything else was put back.",
                "Load the model again to be sure of its state.",
            )
        if buried:
            names = ", ".join(dict.fromkeys(write.description for write in buried.values()))
            warnings.warn(
                f"Somebody else's patch was left on {names}. What this package had put below it does nothing any more.",
                ForeignPatchWarning,
                stacklevel=3,
            )
