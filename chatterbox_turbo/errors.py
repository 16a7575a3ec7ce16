"""Every error that this package raises on purpose: what happened, why, and what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

SHORT, LONG = 80, 300  # characters of a user's value in a message, and of a path


class TurboError(Exception):
    """Base of all errors of this package.

    The message has up to three sentences: *what* went wrong, *why*, and the *remedy*.
    """

    def __init__(self, what: str, why: str = "", remedy: str = ""):
        super().__init__(" ".join(part for part in (what, why, remedy) if part))
        self.what, self.why, self.remedy = what, why, remedy


class UnsupportedModelError(TurboError, TypeError):
    """The object is not one of upstream's models, or lacks the parts of one."""


class InvalidConfigError(TurboError, ValueError):
    """The configuration names an unknown key, has a wrong value, or contradicts itself."""


class UnavailablePassError(TurboError):
    """A pass that the configuration demands (``enabled = true``) cannot run here."""


class BudgetError(TurboError, ValueError):
    """A memory budget that no set of passes fits into, or that this device cannot have.

    Attributes:
        needed: the smallest budget in bytes that would do, by the fidelity that allows it.
    """

    def __init__(self, what: str, why: str = "", remedy: str = "", needed: Mapping[str, int] | None = None):
        super().__init__(what, why, remedy)
        self.needed = dict(needed or {})


class PassConflictError(TurboError):
    """Two passes that the configuration demands exclude each other."""


class ForeignPatchError(TurboError):
    """Somebody else's patch sits where this package wants to write, or on top of what it wrote."""


class UncopyableModelError(TurboError, TypeError):
    """An optimized model was to be copied or pickled."""


class InvalidRequestError(TurboError, ValueError):
    """An argument is out of range or unknown: temperature, penalty, number of tokens, device."""


class ReferenceAudioError(TurboError, ValueError):
    """A reference recording is no audio, too short, or holds values that are not finite; the old voice stays."""


class ReferenceAudioMissingError(ReferenceAudioError, FileNotFoundError):
    """There is no reference recording at that path."""


class VoiceFileError(TurboError, ValueError):
    """A voice's file is missing, damaged, something else, of a newer version, or of another family's model."""


class DecodingError(TurboError, RuntimeError):
    """The token loop met logits that no token can be drawn from."""


class ModelUnavailableError(TurboError):
    """A checkpoint is neither cached nor downloadable, is damaged or does not fit, or upstream cannot be imported."""


class TrainingError(TurboError, RuntimeError):
    """A vocoder's training cannot begin, go on or be resumed: nothing to hear, no space left, a loss that is none."""


class SpeechTruncatedWarning(UserWarning):
    """Speech was cut at ``max_new_tokens`` before the model ended it."""


class RunawayWarning(UserWarning):
    """A piece of a long text went wrong: repetition, silence, no end, too little speech."""


class NumbersKeptWarning(UserWarning):
    """Numbers were to be words, and stay as they are written: there are no rules for the language of the text."""


class WatermarkWarning(UserWarning):
    """An output left ``generate`` without a watermark and received one from the guard."""


class ForeignPatchWarning(UserWarning):
    """A model was reverted below somebody else's patch, which stays; what was below it does nothing any more."""


class OriginalsDiscardedWarning(UserWarning):
    """Weights are rounded now, because a configuration had let go of the original ones (``originals = "discard"``)."""


class SlowLoadingWarning(UserWarning):
    """A model was loaded by upstream's own loader: this release or fork does something that ``load`` does not know."""


def describe(error: BaseException) -> str:
    """Kind and beginning of an error's message on one line, for a reason in a report.

    torch's messages go on for pages; dynamo names the cause on their second line.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


class _Brief(reprlib.Repr):
    """``repr`` that says of large things what they are."""

    def __init__(self, longest: int):
        super().__init__()
        self.longest = longest
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 4
        self.maxlevel = 3

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= self.longest else f"{x[: self.longest // 2]!r}… ({len(x):,} characters)"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, bytes | bytearray | memoryview):
            return repr(x) if isinstance(x, bytes) and len(x) <= self.longest // 2 else f"{len(x):,} bytes"
        if getattr(x, "shape", ()) != () and hasattr(x, "dtype"):
            return f"a {type(x).__name__} of shape {tuple(x.shape)}"
        text = " ".join(super().repr_instance(x, level).split())
        return text if len(text) <= self.longest else f"{text[: self.longest]}…"

    repr_ndarray = repr_Tensor = repr_bytes = repr_instance  # reprlib goes by names of types


def brief(value: Any, longest: int = SHORT) -> str:
    """A user's value for a message: its ``repr`` where that is short, otherwise its beginning, or what it is."""
    return _Brief(longest).repr(value)
