"""Upstream's arguments to a request for T3, and what is said of how its speech has ended."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Generator, Tensor, nn

from ..config import DecodingSection
from ..errors import DecodingError, InvalidRequestError, SpeechTruncatedWarning
from ..runtime import arguments
from ..runtime.t3.alignment import describe
from ..runtime.t3.requests import Request
from ..runtime.t3.sampling import SamplingParameters
from ..upstream import t3 as upstream_t3

logger = logging.getLogger(__name__)


class TokenRequests:
    """``request``: the arguments of T3's own function to a request, by the kind of T3.

    Args:
        longest: ``decoding.max_new_tokens``.
        zero: whether a temperature of 0 means the likeliest token; in upstream it leaves the logits alone.
    """

    def __init__(self, t3: nn.Module, longest: int | None, zero: bool):
        self._t3, self._longest, self._zero = t3, longest, zero
        self.request = self.guided if upstream_t3.is_llama(t3) else self.unguided

    def guided(
        self,
        *,
        t3_cond: Any,
        text_tokens: Tensor,
        initial_speech_tokens: Tensor | None = None,
        prepend_prompt_speech_tokens: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repetition_penalty: float = 1.2,
        cfg_weight: float = 0.5,
        generator: Generator | None = None,
        **unused: Any,  # num_return_sequences, stop_on_eos, do_sample, length_penalty: upstream reads none of them
    ) -> Request:
        """The arguments of ``T3.inference``. Without guidance (``cfg_weight`` 0) one row is decoded, not two."""
        if prepend_prompt_speech_tokens is not None:
            what = "prepend_prompt_speech_tokens is not supported."
            raise InvalidRequestError(what, "Upstream has no such code either.")
        cfg_weight = arguments.number("cfg_weight", cfg_weight)
        rows = 2 if cfg_weight > 0.0 else 1
        text_tokens = upstream_t3.check_text(self._t3, text_tokens)
        if text_tokens.size(0) < rows:
            raise InvalidRequestError(
                f"cfg_weight is {cfg_weight}, but the text has one row.", "Guidance needs the text twice.", "Repeat it."
            )
        text_tokens = text_tokens[:rows]
        embeds, start = upstream_t3.prefix(self._t3, t3_cond, text_tokens, cfg_weight, initial_speech_tokens)
        return Request(
            embeds=embeds,
            knobs=SamplingParameters(temperature, repetition_penalty, min_p, top_p, guidance=cfg_weight),
            limit=self._limit(max_new_tokens, embeds.size(1)),
            text=(start, text_tokens.size(1)),
            voice=start,
            generator=generator,
        )

    def unguided(
        self,
        t3_cond: Any,
        text_tokens: Tensor,
        temperature: float = 0.8,
        top_k: int = 1000,
        top_p: float = 0.95,
        repetition_penalty: float = 1.2,
        max_gen_len: int = 1000,
        generator: Generator | None = None,
    ) -> Request:
        """The arguments of ``T3.inference_turbo``."""
        if arguments.number("temperature", temperature) == 0.0 and not self._zero:
            temperature = 1.0  # upstream leaves the logits alone at 0, and its tokens are promised
        embeds, voice = upstream_t3.prefix(self._t3, t3_cond, text_tokens, cfg_weight=0.0)
        return Request(
            embeds=embeds,
            knobs=SamplingParameters(temperature, repetition_penalty, top_p=top_p, top_k=top_k),
            # upstream counts from the second token
            limit=self._limit(arguments.whole("max_gen_len", max_gen_len) + 1, embeds.size(1)),
            voice=voice,
            generator=generator,
        )

    def _limit(self, asked: int | None, prefix: int) -> int:
        capacity = upstream_t3.token_capacity(self._t3) - (0 if upstream_t3.is_llama(self._t3) else prefix)
        limit = self._longest or (capacity if asked is None else arguments.whole("max_new_tokens", asked))
        if limit < 1:
            raise InvalidRequestError(f"max_new_tokens is {limit}, but must be at least 1.")
        if capacity < 1:
            raise InvalidRequestError(
                f"The voice and text take {prefix} positions, and the model has no more.", "", "Shorten the text."
            )
        return min(limit, capacity)


def tell(request: Request, count: int, end: str, reasons: int) -> None:
    """Warn of speech that ended otherwise than by the model's own will."""
    if not count:
        raise DecodingError("No token can be drawn at step 0.", "Every id is excluded.", "Loosen top_k and top_p.")
    if end == "limit":
        seconds = request.limit / upstream_t3.TOKENS_PER_SECOND
        _warn(
            f"Speech was cut at {request.limit} tokens ({seconds:.1f} s) before the model ended it. Shorten the text, "
            "or raise decoding.max_new_tokens."
        )
    elif end == "exhausted":
        _warn(f"Speech was cut at {count} tokens: every id was excluded. Loosen top_k and top_p.")
    elif reasons:
        logger.warning("Speech was ended after %d tokens: %s.", count, ", ".join(describe(reasons)))


def _warn(message: str) -> None:
    if not _untold.get():
        warnings.warn(message, SpeechTruncatedWarning, stacklevel=2)


# Python's own filters are the process's: other threads would go without their warnings meanwhile
_untold: ContextVar[bool] = ContextVar("untold", default=False)


@contextmanager
def untold() -> Iterator[None]:
    """In the body, this thread is not warned of speech that is cut."""
    token = _untold.set(True)
    try:
        yield
    finally:
        _untold.reset(token)


def progress_of(section: DecodingSection, limit: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A function to call with the tokens so far, and one to call at the end."""
    if callable(section.progress):
        return lambda count: section.progress(count, limit), lambda: None
    if section.progress == "off":
        return lambda count: None, lambda: None
    from tqdm import tqdm

    bar = tqdm(total=limit, desc="Sampling", dynamic_ncols=True)
    return lambda count: bar.update(), bar.close
