"""What was given in place of a reference recording, in words, and what to pass instead."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import soundfile

from ...errors import LONG, ReferenceAudioError, brief

PATH = "Pass the path of an audio file, or a file opened in binary mode."
NONE = "To keep the voice that the model has, leave the argument out of generate."
SAMPLES = (
    "Write them to memory: file = io.BytesIO(); soundfile.write(file, samples, rate, format='WAV'); file.seek(0); "
    "then pass file. Samples are (n,) or (n, channels) there."
)
LONGEST_PATH = 4096  # bytes, with which Linux is the most generous
_DATA, _URL = re.compile(r"data:"), re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# of RIFF, ID3, OggS, fLaC, MPEG; or longer than paths are
_BASE64 = re.compile(r"(?=UklGR|SUQz|T2dnU|ZkxhQ|//|.{1000})[A-Za-z0-9+/_\s-]{50,}=*\s*\Z")


def refuse(given: Any) -> None:
    """Raise where something is neither a path nor a file, however it may be opened.

    Raises:
        ReferenceAudioError: what it is instead, never its content, and what to pass.
    """
    if isinstance(given, str | bytes | os.PathLike):
        path = os.fsencode(given)
        fits = 0 < len(path) <= LONGEST_PATH and b"\0" not in path
    else:
        fits = isinstance(given, int | soundfile.SoundFile) or callable(getattr(given, "read", None))
    if not fits:
        raise error_for(given)


def error_for(given: Any, cause: str = "") -> ReferenceAudioError:
    """The error for something that cannot be read; ``cause``: the reader's words, without the content."""
    what, remedy = _what(given)
    cannot = "cannot be read" + (f": {cause}" if cause else "")
    return ReferenceAudioError(f"The reference audio is {what}, which {cannot}.", "", remedy)


def _what(given: Any) -> tuple[str, str]:
    if given is None:
        return "None", f"{PATH} {NONE}"
    if isinstance(given, str | bytes) and not given:
        return "an empty string", f"{PATH} {NONE}"
    if isinstance(given, str):
        return _text(given)
    if isinstance(given, bytes | bytearray | memoryview):
        return f"{len(given):,} bytes", "Pass a file of them: io.BytesIO(data)."
    shape = getattr(given, "shape", None)
    if shape is not None and hasattr(given, "dtype"):
        kind = "a NumPy array" if type(given).__module__.startswith("numpy") else "a tensor"
        host = "" if kind == "a NumPy array" else " With samples = tensor.squeeze().T.cpu().numpy()."
        return f"{kind} of shape {tuple(shape)}", SAMPLES + host
    if isinstance(given, Mapping):
        if {"waveform", "sample_rate"} <= given.keys():
            what = "a dict with waveform and sample_rate, as ComfyUI gives"
            samples = "samples = audio['waveform'][0].T.cpu().numpy(), rate = audio['sample_rate']"
            return what, f"{SAMPLES} With {samples}."
        return f"a dict with {brief(list(given))}", PATH
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], int):
        what = "a tuple of rate and samples, as Gradio gives"
        return what, f"Use gr.Audio(type='filepath') and pass its path. Or: {SAMPLES} With rate, samples = audio."
    if isinstance(given, list | tuple):
        return f"a {type(given).__name__} of {len(given):,}", PATH
    if isinstance(given, os.PathLike):
        return _text(os.fsdecode(given))
    return brief(given, LONG), PATH


def is_no_path(given: str) -> bool:
    """Whether text is something else than the path of a file that might be there."""
    return any(pattern.match(given) for pattern in (_DATA, _URL, _BASE64))


def _text(given: str) -> tuple[str, str]:
    size = f"{len(given):,} characters"
    if _DATA.match(given):
        return f"a data URI ({size})", "Pass io.BytesIO(base64.b64decode(uri.partition(',')[2]))."
    if _URL.match(given):
        return (
            f"a URL ({brief(given, LONG)})",
            "Download it, and pass the path of the file or io.BytesIO of its content.",
        )
    if _BASE64.match(given):
        return f"base64 text ({size})", "Pass io.BytesIO(base64.b64decode(text))."
    if len(given) <= LONGEST_PATH and os.path.isdir(given):
        return f"the folder {brief(given, LONG)}", "Pass the path of an audio file in it."
    return brief(given, LONG), PATH
