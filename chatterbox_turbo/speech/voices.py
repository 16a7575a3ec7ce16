"""``model.turbo.voices``: voices by name, and the encoded recordings that are kept by content."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import soundfile

from ..config.messages import nearest
from ..errors import InvalidRequestError, brief
from ..passes.base import Call, parameters
from ..passes.conditioning import REFERENCES
from ..runtime import forks
from ..runtime.voice import names
from ..runtime.voice.cache import VoiceCache
from ..runtime.voice.reference_audio import Reference
from ..upstream import voices
from ..upstream.conditioning import entry_point
from ..upstream.families import Parts, identify
from ..upstream.voices import NamedVoice
from ..upstream.warmup import voice_attribute
from .named_voices import NamedVoices

# (store, voice) of the blocks that the running thread or task is in, innermost last; no voice: the model's own
_blocks: ContextVar[tuple[tuple[object, NamedVoice | None], ...]] = ContextVar("voices", default=())


class Voices(NamedVoices):
    """Voices by name: a user's own data, on the host, never dropped for want of room.

    Names can be had by ``in``, iteration and ``list``. ``generate(..., voice="name")`` speaks with one, for that call.
    They stay when another configuration is applied; ``revert`` lets go of them with ``model.turbo``, so ``save`` them
    before. They also stay when the encoders' weights change.

    ``len``, ``hits``, ``misses``, ``clear()`` are those of ``recordings``. Safe to use from several threads.

    Attributes:
        recordings: what the conditioning pass has encoded, kept by content (``runtime.voice.cache.VoiceCache``); or
            ``None`` where that pass does not run.
        limit: bytes of all named voices at most (``conditioning.voices_bytes``).
    """

    def __init__(self, model: Any, model_lock: AbstractContextManager):
        super().__init__()
        self._model, self._model_lock = weakref.ref(model), model_lock
        self._key = object()
        self._in_force: Callable[[], bool] = bool
        self.recordings: VoiceCache | None = None

    def attach(self, recordings: VoiceCache | None, limit: int, in_force: Callable[[], bool]) -> None:
        """Go on with what another configuration has put in place."""
        self.recordings, self.limit, self._in_force = recordings, limit, in_force

    def add(self, name: str, audio: Any, *, replace: bool = False, **options: Any) -> None:
        """Keep a voice under a name; the model's own voice stays.

        Args:
            audio: a recording (a path, or a file opened in binary mode), encoded as ``prepare_conditionals`` or
                ``set_target_voice`` does it; or a voice: upstream's ``Conditionals``, or a ``ref_dict`` of voice
                conversion. It is copied.
            replace: take the place of a voice of that name.
            options: of the method that encodes (Turbo: ``norm_loudness``). Exaggeration is none: it is ``generate``'s.

        Raises:
            InvalidRequestError: the name is taken, or cannot be a file's; the voice is another family's, or there is
                no room for it; unknown options.
            ReferenceAudioError: bad audio.
        """
        name = names.checked(name)
        self._check_free([name], replace)
        parts = self._parts()
        if voices.is_voice(audio):
            self._check_options(options, ())
            try:
                named = NamedVoice(voices.cleaned(*voices.halves(audio)), voices.family_of(audio, parts))
                reason = voices.why_not(named, parts)
            except ValueError as error:
                reason = f"It is damaged: {error}"
            if reason:
                raise InvalidRequestError(f"The voice {brief(name)} does not fit this model.", f"{reason}.")
        else:
            self._check_options(options, voices.options(parts))
            named = self._encoded(audio, options)
        self._put({name: named}, replace)

    def use(self, name: str) -> None:
        """Make a voice the model's own from now on, for all threads; waits for a call that is running.

        Raises:
            InvalidRequestError: there is no such voice, or the model was reverted.
        """
        found = self._find(name)
        with self._model_lock:
            self._check_in_force()
            parts = self._parts()
            setattr(parts.model, voice_attribute(parts), voices.conditionals(parts, found.voice))

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """In the body, calls and batches speak with a voice where they name none and bring no recording.

        That goes for the thread or asyncio task that is in the body, and for tasks that it starts there
        (``asyncio.to_thread`` included). Others, and the model's own voice, are not affected. It is the voice that has
        the name when the body is entered.

        Raises:
            InvalidRequestError: there is no such voice, or the model was reverted.
        """
        self._check_in_force()
        with self._block(self._find(name)):
            yield

    def outside(self) -> AbstractContextManager[None]:
        """In the body, as outside of every ``using``: calls speak with the voice that is on the model."""
        return self._block(None)

    @contextmanager
    def _block(self, named: NamedVoice | None) -> Iterator[None]:
        entry = (self._key, named)
        _blocks.set((*_blocks.get(), entry))
        try:
            yield
        finally:  # not by the token: an async generator may be closed in another context
            _blocks.set(tuple(one for one in _blocks.get() if one is not entry))

    def conditionals(self, name: str) -> Any:
        """A voice as upstream has it (``Conditionals`` or ``ref_dict``): a copy on the model's device."""
        return voices.conditionals(self._parts(), self._find(name).voice)

    # -- what requests speak with

    def choose(self, voice: Any = None, recording: Any = None) -> Any:
        """The conditionals of one request, its own to write to; ``None``: the model's own voice, or the recording's.

        Args:
            voice: a name, or conditionals.
            recording: what the request has as ``audio_prompt_path`` or ``target_voice_path``.

        Raises:
            InvalidRequestError: there is no such voice; both were given.
        """
        if voice is None:
            named = next((named for key, named in reversed(_blocks.get()) if key is self._key), None)
            with_block = named is not None and not _is_given(recording)
            return voices.conditionals(self._parts(), named.voice) if with_block else None
        if _is_given(recording):
            raise InvalidRequestError(
                f"Both voice ({brief(voice)}) and a recording ({brief(recording)}) were given.", "", "Pass one of them."
            )
        if isinstance(voice, str):
            return self.conditionals(voice)
        handed = voices.handed(self._parts(), voice)
        if handed is not None:
            return handed
        raise InvalidRequestError(
            f"voice is {brief(voice)}, but must be a name, or conditionals.",
            "",
            f"A recording is passed as {' or '.join(REFERENCES)}.",
        )

    def chosen(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """An item of a batch, with conditionals in place of a name, or of nothing in a block of ``using``."""
        found = self.choose(item.get("voice"), item.get("audio_prompt_path"))
        rest = {key: value for key, value in item.items() if key != "voice"}
        return rest if found is None else {**rest, "voice": found}

    @contextmanager
    def scope(self, call: Call) -> Iterator[None]:
        """Around ``generate``: the voice that it names, or of the block around it, for that call alone."""
        parts = self._parts()
        taken = parameters(parts.model.generate)
        given = None if "voice" in taken else call.kwargs.pop("voice", None)  # a fork's own parameter stays its own
        arguments = {**dict(zip(taken, call.args, strict=False)), **call.kwargs}
        recordings = [arguments[name] for name in REFERENCES if _is_given(arguments.get(name))]
        chosen = self.choose(given, recordings[0] if recordings else None)
        if chosen is None:
            yield
            return
        attribute, before = voice_attribute(parts), parts.voice
        with forks.undoing(partial(setattr, parts.model, attribute, before)):
            setattr(parts.model, attribute, chosen)
            yield

    # -- the recordings that are kept by content

    def clear(self) -> None:
        """Forget the encoded recordings; named voices stay."""
        if self.recordings is not None:
            self.recordings.clear()

    @property
    def hits(self) -> int:
        """How often a recording was found among those that are kept."""
        return 0 if self.recordings is None else self.recordings.hits

    @property
    def misses(self) -> int:
        """How often a recording was encoded."""
        return 0 if self.recordings is None else self.recordings.misses

    @property
    def nbytes(self) -> int:
        """Bytes of all voices that are kept, named ones and recordings."""
        return self.named_nbytes + (0 if self.recordings is None else self.recordings.nbytes)

    @property
    def tensors(self) -> list[Any]:
        """What holds tensors, for the table of the memory."""
        with self._lock:
            return [self.recordings, [named.voice for named in self._named.values()]]

    def __len__(self) -> int:
        return 0 if self.recordings is None else len(self.recordings)

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        named = f"{len(self.list())} named ({self.named_nbytes / 2**20:.1f} of {self.limit / 2**20:.1f} MiB)"
        lines = [named] if self._named else []
        return "; ".join(lines if self.recordings is None else [*lines, f"recordings: {self.recordings}"])

    # -- inside

    def _encoded(self, audio: Any, options: Mapping[str, Any]) -> NamedVoice:
        """The voice of a recording, by the model's own method, whatever passes have put in its place."""
        reference = Reference.open(audio)
        with self._model_lock:
            self._check_in_force()
            parts = self._parts()
            attribute, before = voice_attribute(parts), parts.voice
            with forks.undoing(partial(setattr, parts.model, attribute, before)):
                getattr(parts.model, entry_point(parts))(_source(reference), **options)
                made = getattr(parts.model, attribute)
        source = {"kind": "recording", "sha256": reference.digest.hex()}
        return NamedVoice(voices.cleaned(*voices.halves(made)), parts.family, source, parts.model.sr)

    def _check_options(self, given: Mapping[str, Any], known: Sequence[str]) -> None:
        for name in given:
            if name == "exaggeration":
                raise InvalidRequestError(
                    "exaggeration is no part of a voice.", "It is made for each call.", "Pass it to generate."
                )
            if name not in known:
                has = f"There {'is' if len(known) == 1 else 'are'}: {', '.join(known)}." if known else "There is none."
                raise InvalidRequestError(f"There is no option {brief(name)}{nearest(name, known)} here.", has)

    def _check_in_force(self) -> None:
        if not self._in_force():
            raise InvalidRequestError(
                "The model of these voices is not optimized any more.",
                "They went with model.turbo; saving and exporting them still works.",
                "Apply again, and load what was saved.",
            )

    def _parts(self) -> Parts:
        model = self._model()
        if model is None:
            raise ReferenceError("The model of these voices is gone.")
        return identify(model)


def _is_given(recording: Any) -> bool:
    """Whether upstream would take it for one: an empty string is none, and an array has no truth."""
    return recording is not None and not (isinstance(recording, str | bytes) and not recording)


def _source(reference: Reference) -> Any:
    """A recording that was read, once more: its path, which tells the decoder a format; or its content."""
    if reference.path is not None:
        return str(reference.path)
    if isinstance(reference.source, bytes):
        return io.BytesIO(reference.source)
    samples, rate = reference.source
    file = io.BytesIO()
    soundfile.write(file, samples.T, rate, format="WAV", subtype="FLOAT")
    file.seek(0)
    return file
