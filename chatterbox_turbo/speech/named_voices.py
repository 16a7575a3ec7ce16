"""Voices by name: a user's own data, bounded by bytes and never dropped for want of room; and their files."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.messages import nearest
from ..errors import InvalidRequestError, VoiceFileError, brief
from ..runtime import forks
from ..runtime.voice import blending, names
from ..runtime.voice.cache import Voice
from ..upstream import voice_files
from ..upstream.families import Parts
from ..upstream.voices import NamedVoice, why_not

SHOWN = 20  # names in a message


class NamedVoices:
    """Voices of one model by name, on the host; safe to use from several threads.

    Attributes:
        limit: bytes of all of them at most.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self._named: dict[str, NamedVoice] = {}
        self._lock = forks.lock()  # of the names alone: never held while the model's is waited for

    def _parts(self) -> Parts:
        """The model that the voices are for."""
        raise NotImplementedError

    def list(self) -> list[str]:
        """The names, in order of addition."""
        with self._lock:
            return [*self._named]

    def show(self, name: str) -> dict[str, Any]:
        """What there is to know of a voice: family, bytes, seconds of its recording that are used, source."""
        return self._find(name).summary()

    def remove(self, name: str) -> None:
        """Forget a voice; files of it stay."""
        with self._lock:
            self._find(name)
            del self._named[_composed(name)]

    def blend(self, weights: Mapping[str, float], *, as_: str, replace: bool = False) -> None:
        """Keep a voice between others: the mean of their speaker embeddings, by weight.

        Embeddings count by their direction. What T3 and S3Gen continue, speech tokens and mel frames of a recording,
        cannot be averaged: they are those of the heaviest voice (the first of equals), which is heard more than its
        weight says.

        Args:
            weights: by name, above 0; of any sum.
            as_: the name of the new voice.

        Raises:
            InvalidRequestError: no weights, or some that are not above 0; embeddings that cancel each other; as in
                ``add``.
        """
        as_ = names.checked(as_)
        if not isinstance(weights, Mapping) or not weights:
            raise InvalidRequestError(
                f"The weights are {brief(weights)}.", "", 'Pass weights by name: {"anna": 0.7, "ben": 0.3}.'
            )
        for name, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight <= 0:
                raise InvalidRequestError(f"The weight of {brief(name)} is {brief(weight)}, but must be above 0.")
        with self._lock:
            each = [self._find(name) for name in weights]
            shares = [weight / sum(weights.values()) for weight in weights.values()]
            heaviest = each[shares.index(max(shares))]
            made = _blended(heaviest, each, shares)
            source = {"kind": "blend", "of": dict(zip(weights, shares, strict=True))}
            family = heaviest.family if made.t3 else "vc"
            self._put({as_: NamedVoice(made, family, source, heaviest.sample_rate)}, replace)

    def save(self, folder: str | os.PathLike, *, replace: bool = False) -> list[str]:
        """Write every voice to a folder, which is made where it is missing: ``<name>.safetensors`` each; the names.

        Each file is written as a whole or not at all. Others in the folder stay.

        Raises:
            VoiceFileError: a file of a name is there and holds another voice (and not ``replace``); nothing is written
                then. Or the folder cannot be written.
        """
        target = Path(folder)
        with self._lock:
            every = dict(self._named)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VoiceFileError(
                f"The folder {brief(str(target))} cannot be made: {error.strerror or error}."
            ) from None
        paths = {name: voice_files.path_of(target, name) for name in every}
        missing = [name for name, path in paths.items() if not _is_there(path, every[name], replace)]
        for name in missing:
            voice_files.write(paths[name], every[name])
        return [*every]

    def load(self, folder: str | os.PathLike, only: Sequence[str] | None = None, *, replace: bool = False) -> list[str]:
        """Keep the voices of a folder under the names of their files; all of them, or none; the names.

        Args:
            only: these alone.
            replace: take the place of voices of the same names. One of the same content is no obstacle.

        Raises:
            VoiceFileError: the folder, or one of the names, is not there; a file is damaged, of something else, of
                another family's model, or of a newer version of this package.
            InvalidRequestError: a name is taken; there is no room for all of them.
        """
        if only is None:
            found = voice_files.named_in(Path(folder))
        else:
            found = {name: voice_files.find(Path(folder), name) for name in map(names.checked, only)}
        loaded = {names.checked(name): self._fitting(path, voice_files.read(path)) for name, path in found.items()}
        self._put(loaded, replace)
        return [*loaded]

    def export(self, name: str, path: str | os.PathLike, *, replace: bool = False) -> Path:
        """Write one voice to a file, or under its name to a folder that exists; the file.

        Raises:
            VoiceFileError: the file exists with another content (and not ``replace``), or cannot be written.
        """
        found, target = self._find(name), Path(path)
        if target.is_dir():
            target = voice_files.path_of(target, names.composed(name))
        if not _is_there(target, found, replace):
            voice_files.write(target, found)
        return target

    def import_(self, path: str | os.PathLike, *, as_: str | None = None, replace: bool = False) -> str:
        """Keep the voice of one file, ours or what upstream's ``Conditionals.save`` has written; its name.

        Args:
            as_: the name; by default that of the file.

        Raises:
            VoiceFileError: as in ``load``; or a pickle of something else, which is not unpickled.
            InvalidRequestError: as in ``add``.
        """
        file = Path(path)
        name = names.checked(file.stem if as_ is None else as_)
        self._put({name: self._fitting(file, voice_files.read_any(file, self._parts().family))}, replace)
        return name

    @property
    def named_nbytes(self) -> int:
        """Bytes of the named voices."""
        with self._lock:
            return sum(named.nbytes for named in self._named.values())

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return _composed(name) in self._named

    def __iter__(self) -> Iterator[str]:
        return iter(self.list())

    # -- inside

    def _fitting(self, path: Path, named: NamedVoice) -> NamedVoice:
        reason = why_not(named, self._parts())
        if reason:
            raise VoiceFileError(
                f"The voice of {brief(str(path))} does not fit this model.",
                f"{reason}.",
                "Make it from its recording with this model: add(name, audio).",
            )
        return named

    def _put(self, new: Mapping[str, NamedVoice], replace: bool) -> None:
        """Keep all of them, or none."""
        with self._lock:
            others = {n: v for n, v in new.items() if n not in self._named or self._named[n].digest != v.digest}
            self._check_free(others, replace, among=new)
            size, rest = sum(v.nbytes for v in new.values()), [v for n, v in self._named.items() if n not in new]
            taken = sum(named.nbytes for named in rest)
            if others and taken + size > self.limit:
                raise InvalidRequestError(
                    f"There is no room for {', '.join(map(brief, new)) if len(new) < 4 else f'{len(new)} voices'}: "
                    f"{size:,} bytes, where {taken:,} of {self.limit:,} are taken by {len(rest)} voices.",
                    "Named voices are never dropped to make room.",
                    "Remove some, or raise conditioning.voices_bytes.",
                )
            self._named.update(others)

    def _check_free(self, wanted: Collection[str], replace: bool, among: Collection[str] = ()) -> None:
        with self._lock:
            known = {names.folded(name): name for name in (*among, *self._named)}  # those that are here count
            for name in wanted:
                there = known.get(names.folded(name), name)
                if there != name:
                    raise InvalidRequestError(
                        f"There is a voice {there!r} already, and {name!r} differs from it in case alone.",
                        "Their files would be the same one on some systems.",
                        "Choose another name.",
                    )
                if name in self._named and not replace:
                    raise InvalidRequestError(
                        f"There is a voice {name!r} already.", "", "Choose another name, or pass replace=True."
                    )

    def _find(self, name: Any) -> NamedVoice:
        with self._lock:
            found, known = self._named.get(_composed(name)), [*self._named]
        if found is not None:
            return found
        close = nearest(str(name), known)
        listed = f"There are: {', '.join(known[:SHOWN])}{' …' if len(known) > SHOWN else ''}." if known else ""
        raise InvalidRequestError(
            f"There is no voice {brief(name)}{close}.", listed or "There are none.", "Add it: voices.add(name, audio)."
        )


def _is_there(path: Path, named: NamedVoice, replace: bool) -> bool:
    """Whether a file holds that very voice.

    Raises:
        VoiceFileError: it holds something else, and is not to be replaced, or is no voice.
    """
    if not path.exists():
        return False
    if voice_files.read(path).digest == named.digest:
        return True
    if not replace:
        raise VoiceFileError(
            f"{path} is there and holds another voice.", "", "Choose another place, or pass replace=True."
        )
    return False


def _blended(heaviest: NamedVoice, each: Sequence[NamedVoice], shares: Sequence[float]) -> Voice:
    """The voice between others; without a half for T3 where one of them has none."""
    whole = all(one.voice.t3 for one in each)
    made = Voice(dict(heaviest.voice.t3) if whole else {}, dict(heaviest.voice.gen))
    for half, name in (("t3", "speaker_emb"), ("gen", "embedding")):
        if getattr(made, half):
            mean = blending.mean_direction([getattr(one.voice, half)[name] for one in each], shares)
            if mean is None:
                raise InvalidRequestError(f"These voices cancel each other: the mean of their {name} has no direction.")
            getattr(made, half)[name] = mean
    return made


def _composed(name: Any) -> Any:
    return names.composed(name) if isinstance(name, str) else None
