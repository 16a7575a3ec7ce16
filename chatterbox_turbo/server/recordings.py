"""An upload, looked at before a model sees it: its form, its size, and how much it is once decoded."""

from __future__ import annotations

import io

import soundfile
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from .limits import Limits
from .refusals import ClientGone, Refusal

CONTAINERS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF")
RATES, CHANNELS = (8_000, 192_000), 8
BLOCK = 65_536  # frames at once
SILENT = 1e-4  # of full scale
FIELDS = ("name", "audio_sample")


async def form(request: Request, limits: Limits) -> tuple[str, bytes]:
    """Name and recording of a ``multipart/form-data`` body; both in memory, never on the disk.

    Raises:
        Refusal: it is something else, too large, or not all of it is there.
        ClientGone: nobody sends the rest.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refusal(415, "Send a form (multipart/form-data) with name and audio_sample.", "not_a_form")
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=4)
    parser.max_part_size, parser.spool_max_size = 4096, limits.form + 1
    try:
        fields = await parser.parse()
    except ClientDisconnect:
        raise ClientGone from None
    except (MultiPartException, ValueError, LookupError) as error:  # ValueError: the parser's own
        reason = getattr(error, "message", "") or str(error)
        raise Refusal(400, f"The form cannot be read: {reason}", "bad_form") from None
    try:
        unknown = sorted({*fields} - {*FIELDS})
        name, sample = fields.get("name"), fields.get("audio_sample")
        if unknown or not isinstance(name, str) or not isinstance(sample, UploadFile):
            raise Refusal(
                400, "The form must have name (text) and audio_sample (a file), and nothing else.", "bad_form"
            )
        return name, await sample.read(limits.upload + 1)
    finally:
        await fields.close()


def check(data: bytes, limits: Limits) -> None:
    """Look whether bytes are a recording that may be decoded as a whole.

    Decoded block by block, so that a file that unpacks to more than is allowed costs no more than that.

    Raises:
        Refusal: they are none, or too many, or too long.
    """
    if len(data) > limits.upload:
        raise _bad(413, f"The recording has more than {limits.upload:,} bytes.")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            if sound.format not in CONTAINERS:
                raise _bad(400, f"The recording is {sound.format}; send WAV, FLAC, Ogg, MP3 or AIFF.")
            if not RATES[0] <= sound.samplerate <= RATES[1] or not 1 <= sound.channels <= CHANNELS:
                raise _bad(400, f"The recording has {sound.channels} channels at {sound.samplerate} Hz.")
            most = int(limits.recording * sound.samplerate)
            count, loudest = sound.frames, 0.0
            if count <= most:
                count = 0
                while len(block := sound.read(BLOCK, dtype="float32")) and count <= most:
                    count, loudest = count + len(block), max(loudest, float(abs(block).max()))
    except (soundfile.SoundFileError, ValueError, RuntimeError, MemoryError) as error:
        raise _bad(400, f"The recording is not audio that can be decoded: {error}") from None
    if count > most:
        raise _bad(413, f"The recording is longer than {limits.recording:g} s.")
    if not loudest > SILENT:
        raise _bad(400, "The recording is silent.")


def _bad(status: int, message: str) -> Refusal:
    return Refusal(status, message, "invalid_recording", "audio_sample")
