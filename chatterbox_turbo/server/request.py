"""What a client may ask for: OpenAI's fields, and the numbers that this model speaks by."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import brief
from ..upstream.stages import knobs
from .audio import FORMATS
from .limits import Limits
from .refusals import Refusal

ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")  # what clients send whose users cannot choose
KNOBS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "exaggeration", "cfg_weight")
LARGEST_SEED = 2**53 - 1  # which JSON numbers hold


class SpeechRequest(BaseModel):
    """The body of ``POST /v1/audio/speech``. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    input: str = Field(description="What is said.")
    model: str = Field("tts-1", description="The name of the model that this server has, or one of OpenAI's.")
    voice: str = Field("default", description="Of /v1/audio/voices.")
    response_format: str = Field("mp3", description="mp3, opus, flac, wav or pcm (16 bits, little-endian, mono).")
    speed: float = Field(1.0, description="1.0; the model speaks at its own.")
    instructions: str | None = Field(None, description="None: the model takes none.")
    stream: bool = Field(False, description="Bytes while they are made. Without it the answer has a length.")
    stream_format: Literal["audio", "sse"] | None = Field(None, description="sse: events with base64; both stream.")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="Of all random numbers; drawn where missing.")
    language: str | None = Field(None, max_length=20, description="Code of the language; models of several only.")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=0, le=100_000)
    min_p: float | None = None
    repetition_penalty: float | None = None
    exaggeration: float | None = Field(None, ge=0, le=10)
    cfg_weight: float | None = Field(None, ge=0, le=10)

    @property
    def streams(self) -> bool:
        """Whether the answer is sent while it is made."""
        return self.stream or self.stream_format is not None


def arguments(asked: SpeechRequest, family: str, languages: tuple[str, ...], limits: Limits) -> dict[str, Any]:
    """Arguments of ``model.turbo.stream``, without voice and seed.

    Args:
        languages: codes that the model speaks; none where it takes no code.

    Raises:
        Refusal: something that this model cannot do, or too much of it.
    """
    if asked.model not in (family, *ALIASES):
        raise Refusal(404, f"There is no model {brief(asked.model)} here, but {family}.", "model_not_found", "model")
    if asked.response_format not in FORMATS:
        known = ", ".join(FORMATS)
        raise _bad(
            "response_format", f"response_format is {brief(asked.response_format)}, but must be one of: {known}."
        )
    if asked.speed != 1.0:
        raise _bad("speed", f"speed is {asked.speed}, but only 1.0 is spoken here.")
    if asked.instructions:
        raise _bad("instructions", "This model takes no instructions; leave them out.")
    given: dict[str, Any] = {"text": _text(asked.input, limits.text)}
    taken = knobs(family)
    for name in KNOBS:
        value = getattr(asked, name)
        if value is not None and name not in taken:
            raise _bad(name, f"The {family} model has no {name}; it has: {', '.join(taken)}.")
        if value is not None:
            given[name] = value
    if languages:
        language = (asked.language or "en").lower()
        if language not in languages:
            raise _bad("language", f"The language {brief(language)} is none of: {', '.join(languages)}.")
        given["language_id"] = language
    elif asked.language not in (None, "en"):
        raise _bad("language", f"The {family} model speaks English only.")
    return given


def _text(text: str, longest: int) -> str:
    if len(text) > longest:
        raise _bad("input", f"The input has {len(text):,} characters, and {longest:,} are allowed.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad("input", "The input has half of a surrogate pair, which is no character.") from None
    if not any(character.isalnum() for character in text):
        raise _bad("input", "The input has no letter and no digit, so that there is nothing to say.")
    return text


def _bad(param: str, message: str) -> Refusal:
    return Refusal(400, message, "invalid_request", param)
