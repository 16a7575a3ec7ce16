"""The token loop of T3: no backend rebuilt for every call, the head where it is needed, a limit that speaks up.

Replaces ``T3.inference`` (Llama) and ``T3.inference_turbo`` (GPT-2) of upstream's ``t3.py`` by
``runtime.token_loop`` over upstream's own backbone, embeddings and alignment analyzer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DecodingSection
from ..errors import DecodingError, InvalidRequestError, SpeechTruncatedWarning
from ..runtime.backbone import TransformersBackbone
from ..runtime.sampling import SamplingParameters, guide, sample_guided, sample_unguided
from ..runtime.token_loop import Request, generate_tokens
from ..upstream import t3 as upstream_t3
from ..upstream.alignment import build_analyzer
from ..upstream.patch_points import GPT2, LLAMA
from .base import Context, Pass

TOKENS_PER_SECOND = 25


class DecodingPass(Pass):
    """One loop for all families; random numbers are drawn as upstream draws them."""

    name = "decoding"
    summary = "one token loop: nothing rebuilt for a call, one row without guidance, limit and progress settable"
    families = (*LLAMA, *GPT2)
    patch_points = ("t3.inference", "t3.inference_turbo", "t3.prepare_input_embeds", "t3.tfmr.forward")
    replaces = ("t3.inference", "t3.inference_turbo")

    def check(self, context: Context) -> str:
        limit = context.config.decoding.max_new_tokens
        capacity = upstream_t3.token_capacity(context.parts.t3)
        if limit is not None and limit > capacity:
            return f"decoding.max_new_tokens is {limit}, but the model has positions for {capacity}"
        return ""

    def apply(self, context: Context) -> str:
        t3 = context.parts.t3
        name, loop = ("inference", _inference) if upstream_t3.is_llama(t3) else ("inference_turbo", _inference_turbo)
        replacement = torch.inference_mode()(partial(loop, t3, context.config.decoding))
        context.journal.wrap(t3, name, lambda wrapped, instance, args, kwargs: replacement(*args, **kwargs))
        return ""


def _inference(
    t3: nn.Module,
    section: DecodingSection,
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
    **unused: Any,  # num_return_sequences, stop_on_eos, do_sample, length_penalty: upstream reads none of them
) -> Tensor:
    """Speech tokens (1, n) int64, the stop token included, like upstream's ``T3.inference``.

    Without guidance (``cfg_weight`` 0, where upstream's English model fails) one row is decoded, not two.
    """
    if prepend_prompt_speech_tokens is not None:
        raise InvalidRequestError("prepend_prompt_speech_tokens is not supported.", "Upstream has no such code either.")
    knobs = SamplingParameters(temperature, repetition_penalty, min_p, top_p)
    rows = 2 if cfg_weight > 0.0 else 1
    text_tokens = upstream_t3.check_text(t3, text_tokens)
    if text_tokens.size(0) < rows:
        raise InvalidRequestError(
            f"cfg_weight is {cfg_weight}, but the text has one row.", "Guidance needs the text twice.", "Repeat it."
        )
    text_tokens = text_tokens[:rows]
    embeds, conditioning = upstream_t3.prefix(t3, t3_cond, text_tokens, cfg_weight, initial_speech_tokens)
    analyzer = build_analyzer(t3, conditioning, text_tokens.size(1))

    def choose(logits: Tensor, history: Tensor) -> Tensor:
        logits = guide(logits, cfg_weight)
        if analyzer is not None:
            logits = analyzer.step(logits, next_token=int(history[0, -1]))
        return sample_guided(logits, history, knobs)

    request = Request(
        embeds=embeds,
        choose=choose,
        embed=lambda token, position: upstream_t3.embed_token(t3, token, position, rows),
        start_token=upstream_t3.start_token(t3),
        stop_token=upstream_t3.stop_token(t3),
        limit=_limit(t3, section, max_new_tokens),
    )
    return _collect(t3, section, request, upstream_t3.needs_attention_maps(t3))


def _inference_turbo(
    t3: nn.Module,
    section: DecodingSection,
    t3_cond: Any,
    text_tokens: Tensor,
    temperature: float = 0.8,
    top_k: int = 1000,
    top_p: float = 0.95,
    repetition_penalty: float = 1.2,
    max_gen_len: int = 1000,
) -> Tensor:
    """Speech tokens (1, n) int64 without the stop token, like upstream's ``T3.inference_turbo``."""
    knobs = SamplingParameters(temperature, repetition_penalty, top_p=top_p, top_k=top_k)
    embeds, _ = upstream_t3.prefix(t3, t3_cond, text_tokens, cfg_weight=0.0)
    request = Request(
        embeds=embeds,
        choose=lambda logits, history: sample_unguided(logits, history, knobs),
        embed=lambda token, position: upstream_t3.embed_token(t3, token, position, 1),
        start_token=upstream_t3.start_token(t3),
        stop_token=upstream_t3.stop_token(t3),
        limit=_limit(t3, section, max_gen_len + 1),  # upstream counts from the second token
        history_keeps_start=False,
        stops_at_first=False,
    )
    tokens = _collect(t3, section, request, attention_maps=False)
    return tokens[:, :-1] if int(tokens[0, -1]) == request.stop_token else tokens


def _limit(t3: nn.Module, section: DecodingSection, asked: int | None) -> int:
    capacity = upstream_t3.token_capacity(t3)
    limit = section.max_new_tokens or (capacity if asked is None else asked)
    if limit < 1:
        raise InvalidRequestError(f"max_new_tokens is {limit}, but must be at least 1.")
    return min(limit, capacity)


def _collect(t3: nn.Module, section: DecodingSection, request: Request, attention_maps: bool) -> Tensor:
    """Run one request to its end: tokens (1, n)."""
    backbone = TransformersBackbone(upstream_t3.backbone(t3), upstream_t3.head(t3), attention_maps)
    advance, finish = _progress(section, request.limit)
    ids, end = [], None
    try:
        for token in generate_tokens([request], backbone):
            end = token.end
            if token.id is not None:
                ids.append(token.id)
                advance(len(ids))
    finally:
        finish()
    if not ids:
        raise DecodingError("No token can be drawn at step 0.", "Every id is excluded.", "Loosen top_k and top_p.")
    if end == "limit":
        _warn(
            f"Speech was cut at {request.limit} tokens ({request.limit / TOKENS_PER_SECOND:.1f} s) before the model "
            "ended it. Shorten the text, or raise decoding.max_new_tokens."
        )
    elif end == "exhausted":
        _warn(f"Speech was cut at {len(ids)} tokens: every id was excluded. Loosen top_k and top_p.")
    return torch.cat(ids, dim=1)


def _warn(message: str) -> None:
    warnings.warn(message, SpeechTruncatedWarning, stacklevel=2)


def _progress(section: DecodingSection, limit: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A function to call with the tokens so far, and one to call at the end."""
    if callable(section.progress):
        return lambda count: section.progress(count, limit), lambda: None
    if section.progress == "off":
        return lambda count: None, lambda: None
    from tqdm import tqdm

    bar = tqdm(total=limit, desc="Sampling", dynamic_ncols=True)
    return lambda count: bar.update(), bar.close
