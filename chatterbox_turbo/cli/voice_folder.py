"""What ``--voice`` and ``--voice-folder`` mean, to every command that speaks, and a line's ``voice`` in ``batch``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer


class VoiceFolder:
    """Voices by name, from files that are read and checked when a name is asked for.

    Args:
        folder: of voices; where there is none, no name is known.

    Attributes:
        digests: SHA-256 of the content of each voice that was asked for, by name.

    Raises:
        VoiceFileError: the folder cannot be read.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._paths = folder, {}
        self.digests: dict[str, str] = {}
        if folder is not None:
            from ..runtime.voice import names
            from ..upstream import voice_files

            self._paths = {names.composed(stem): path for stem, path in voice_files.named_in(folder).items()}

    def argument(self, voice: str) -> dict[str, str]:
        """The argument of ``generate`` that a voice is: one of this folder by its name, else a recording by its path.

        Raises:
            VoiceFileError: it is neither, or the voice's file is damaged.
        """
        from ..config.messages import nearest
        from ..errors import LONG, VoiceFileError, brief

        if self._paths:
            from ..runtime.voice import names
            from ..upstream import voice_files

            name = names.composed(voice)
            if name in self._paths:
                if name not in self.digests:
                    self.digests[name] = voice_files.read(self._paths[name]).digest
                return {"voice": name}
        path = Path(voice)
        if path.is_file():
            return {"audio_prompt_path": voice}
        problem = "is a directory" if path.is_dir() else "does not exist"
        if self._folder is None:
            raise VoiceFileError(
                f"The recording {brief(voice, LONG)} {problem}; the name of a voice needs --voice-folder."
            )
        raise VoiceFileError(
            f"There is no voice {brief(voice)} in {brief(str(self._folder), LONG)}{nearest(voice, self._paths)}, "
            "and no recording of that name."
        )

    def absolute(self) -> VoiceFolder:
        """The same for a process with another working directory."""
        return VoiceFolder(self._folder and self._folder.resolve())

    def load(self, model: Any, names: Sequence[str]) -> None:
        """Give an optimized model voices of this folder.

        Raises:
            VoiceFileError: one is of another family's model.
            InvalidRequestError: there is no room for them.
        """
        if names:
            model.turbo.voices.load(self._folder, names)


def chosen(voice: str | None, folder: Path | None) -> tuple[VoiceFolder, dict[str, str]]:
    """The folder, and the argument of ``generate`` that ``--voice`` is, if it was given; before a model is loaded.

    Raises:
        VoiceFileError: as ``VoiceFolder.argument``.
        typer.BadParameter: without a folder, there is no such recording.
    """
    from ..errors import VoiceFileError

    voices = VoiceFolder(folder)
    try:
        return voices, {} if voice is None else voices.argument(voice)
    except VoiceFileError as error:
        if folder is None:
            raise typer.BadParameter(str(error)) from None
        raise


def needs_name(voice: str | None, folder: Path | None) -> None:
    """A refusal of ``--voice-folder`` by commands that speak with one voice, where none is named.

    Raises:
        typer.BadParameter: there is a folder and no name.
    """
    if folder is not None and voice is None:
        raise typer.BadParameter("--voice-folder needs --voice NAME.")
