"""Voices by name as a server has them: the model's own, those of a folder, and what clients upload."""

from __future__ import annotations

import io
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config.messages import nearest
from ..errors import InvalidRequestError, TurboError, VoiceFileError, brief
from ..runtime.voice import names
from ..upstream import voice_files
from .limits import Limits
from .recordings import check
from .refusals import Refusal

logger = logging.getLogger(__name__)

OWN = "default"  # the voice that the model has
File = tuple[int, int, int]  # time of its last change in ns, bytes, number in the file system


class ServedVoices:
    """Voices of an optimized model; ``add``, ``remove`` and ``refresh`` are for the thread that speaks.

    What others put into the folder or take out of it, another server perhaps, is noticed: ``stale``, ``refresh``.

    Args:
        folder: where voices are read from and kept, which exists; without one they go with the server.

    Raises:
        VoiceFileError: a file in the folder is damaged or of another model.
    """

    def __init__(self, model: Any, folder: Path | None, limits: Limits):
        self._model, self._folder, self._limits = model, folder, limits
        self._given = {*model.turbo.voices.list()}  # in no folder
        self._seen: dict[str, File] = {}  # what the files were when they were last read, or could not be
        self._seen = self._there()
        if folder is not None:
            model.turbo.voices.load(folder)
        self._most = len(model.turbo.voices.list()) + limits.voices

    def _there(self) -> dict[str, File]:
        """The files of the folder by the names of their voices; of a folder that is out of reach, as they were."""
        if self._folder is None:
            return {}
        try:
            found = voice_files.named_in(self._folder)
        except VoiceFileError:
            return self._seen
        files = {}
        for stem, path in found.items():
            with suppress(OSError):  # deleted meanwhile
                state = path.stat()
                files[names.composed(stem)] = (state.st_mtime_ns, state.st_size, state.st_ino)
        return files

    @property
    def stale(self) -> bool:
        """Whether a file of the folder has come, gone or changed since."""
        return self._there() != self._seen

    def refresh(self) -> None:
        """Know the voices that the folder has now; what cannot be read is logged, and the voice is as it was."""
        before, self._seen = self._seen, self._there()
        kept = self._model.turbo.voices
        changed = {name for name, file in self._seen.items() if before.get(name) != file}
        for name in sorted(changed - self._given):
            try:
                kept.load(self._folder, [name], replace=True)
            except TurboError as error:
                logger.warning("The voice %s of the folder is left out: %s", brief(name), error)
        for name in {*kept.list()} - self._seen.keys() - self._given:
            kept.remove(name)

    def listed(self) -> list[dict[str, Any]]:
        """What there is to know of each."""
        rows: list[dict[str, Any]] = [{"id": OWN, "name": OWN}]
        for name in self._model.turbo.voices.list():
            try:
                about = self._model.turbo.voices.show(name)
            except InvalidRequestError:  # deleted meanwhile
                continue
            rows.append({"id": name, "name": name, "seconds": about["reference_seconds"]})
        return rows

    def argument(self, name: str) -> dict[str, str]:
        """The argument of ``generate`` that a name is: it is compared with known ones, and never is a path.

        Raises:
            Refusal: there is no such voice.
        """
        known = self._model.turbo.voices.list()
        name = names.composed(name)
        if name == OWN:
            return {}
        if name not in known:
            close = nearest(name, [OWN, *known])
            raise Refusal(400, f"There is no voice {brief(name)}{close}. See /v1/audio/voices.", "no_voice", "voice")
        return {"voice": name}

    def add(self, name: str, recording: bytes) -> str:
        """Keep a recording as a voice, in the folder too; all of it or nothing. Its name.

        Raises:
            Refusal: it is no recording, the name cannot be one or is taken, or there is no room.
        """
        self.refresh()
        kept = self._model.turbo.voices
        try:
            name = names.checked(name)
        except InvalidRequestError as error:
            raise Refusal(400, str(error), "bad_name", "name") from None
        if names.folded(name) in {names.folded(one) for one in (OWN, *kept.list())}:
            raise Refusal(409, f"There is a voice {brief(name)} already.", "voice_exists", "name")
        if len(kept.list()) >= self._most:
            raise Refusal(507, f"There are {self._most} voices, and no room for more.", "no_room")
        check(recording, self._limits)
        try:
            kept.add(name, io.BytesIO(recording))
        except InvalidRequestError as error:
            raise Refusal(507, str(error), "no_room") from None
        if self._folder is not None:
            try:
                kept.export(name, voice_files.path_of(self._folder, name))
                self._seen[name] = self._there().get(name, (0, 0, 0))
            except VoiceFileError as error:
                kept.remove(name)
                raise Refusal(507, _without(error, self._folder), "not_kept") from None
        return name

    def remove(self, name: str) -> str:
        """Forget a voice, and its file. Its name.

        Raises:
            Refusal: there is no such voice, it is the model's own, or the file cannot be deleted.
        """
        self.refresh()
        name = names.composed(name)
        if name == OWN:
            raise Refusal(409, "The model's own voice stays.", "voice_stays", "name")
        if name not in self._model.turbo.voices.list():
            raise Refusal(404, f"There is no voice {brief(name)}.", "no_voice", "name")
        if self._folder is not None:
            try:
                with suppress(VoiceFileError):  # it is gone
                    voice_files.find(self._folder, name).unlink(missing_ok=True)
            except OSError as error:
                raise Refusal(507, f"The voice's file cannot be deleted: {error.strerror}.", "not_kept") from None
        self._seen.pop(name, None)
        self._model.turbo.voices.remove(name)
        return name


def _without(error: VoiceFileError, folder: Path) -> str:
    """The message, without the place in the server's file system."""
    return str(error).replace(f"{folder}/", "")
