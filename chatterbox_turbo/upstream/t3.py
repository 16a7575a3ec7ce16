"""T3, upstream's token model, as the token loop needs it: the prefix, one token's embedding, the limits."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidRequestError

TOKENS_PER_SECOND = 25  # of S3Tokenizer's ids, which are what T3 speaks (upstream: s3tokenizer.S3_TOKEN_RATE)


def backbone(t3: nn.Module) -> nn.Module:
    """The Transformers model (Llama or GPT-2) that turns embeddings into hidden states."""
    return t3.tfmr


def head_width(t3: nn.Module) -> int:
    """Dh, the size of one attention head of the backbone."""
    return t3.tfmr.config.hidden_size // t3.tfmr.config.num_attention_heads


def head(t3: nn.Module) -> nn.Module:
    """Hidden states (…, D) to logits (…, V) over speech tokens."""
    return t3.speech_head


def speech_embedding(t3: nn.Module) -> nn.Module:
    """Speech tokens (…) to embeddings (…, D)."""
    return t3.speech_emb


def start_token(t3: nn.Module) -> int:
    """The id that precedes the first speech token."""
    return t3.hp.start_speech_token


def stop_token(t3: nn.Module) -> int:
    """The id that ends speech."""
    return t3.hp.stop_speech_token


def is_llama(t3: nn.Module) -> bool:
    """Whether tokens carry learned speech positions and guidance (Llama), or neither (GPT-2)."""
    return hasattr(t3.tfmr, "layers")


def entrance(t3: nn.Module) -> str:
    """The method by which ``generate`` asks for speech tokens."""
    return "inference" if is_llama(t3) else "inference_turbo"


# What the sampling of upstream's loop is made of; a release has those that its models need.
_PROCESSORS = (
    "RepetitionPenaltyLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
)


def sampling_names(t3: nn.Module) -> list[tuple[Any, str]]:
    """Where upstream's loop finds what it samples by: (namespace, name) pairs."""
    space = sys.modules.get(type(t3).__module__)
    found = [name for name in _PROCESSORS if hasattr(space, name)]
    return [(space, name) for name in found] + [(getattr(space, name), "__call__") for name in found]


def why_not_own_sampling(t3: nn.Module) -> str:
    """Which function of upstream's sampling is not Transformers' own any more; empty where all are."""
    from transformers.generation import logits_process

    for space, name in sampling_names(t3):
        value = getattr(space, name)
        home = getattr(value, "__module__", "") or ""
        if not home.startswith("transformers.") or (name in _PROCESSORS and value is not vars(logits_process)[name]):
            where = getattr(space, "__name__", "")
            return f"{where}.{name} was patched (by {home or 'an unknown module'})"
    return ""


def token_capacity(t3: nn.Module) -> int:
    """Speech tokens that the model has positions for."""
    if is_llama(t3):
        return t3.hp.max_speech_tokens
    return t3.tfmr.config.n_positions


def needs_attention_maps(t3: nn.Module) -> bool:
    """Whether this Transformers release changes its attention kernel when maps are asked for.

    Older releases leave SDPA for the explicit softmax when ``output_attentions`` is set, as upstream always sets
    it: up to 4.47 the attention layer takes it as a parameter, after that some read it from their options. In
    newer ones the kernel depends on the configuration alone.
    """
    if not is_llama(t3):
        return False
    code = inspect.unwrap(type(t3.tfmr.layers[0].self_attn).forward).__code__
    return "output_attentions" in (*code.co_varnames, *code.co_consts)


def prefix(
    t3: nn.Module, t3_cond: Any, text_tokens: Tensor, cfg_weight: float, speech_tokens: Tensor | None = None
) -> tuple[Tensor, int]:
    """Everything that precedes the first generated token.

    Args:
        t3_cond: upstream's ``T3Cond``.
        text_tokens: (R, S) int64 with start and stop; R = 2 with guidance (the second row is unconditional).
        speech_tokens: (R, n) int64 that speech begins with; the start token where there are none.

    Returns:
        embeddings (R, P, D), and the number of conditioning positions before the text.

    Raises:
        InvalidRequestError: the text lacks its start or stop token.

    Source: upstream ``T3.inference`` (``t3.py``): Llama gets the start token twice, at speech position 0 both
    times, GPT-2 once.
    """
    if speech_tokens is None:
        speech_tokens = torch.full_like(text_tokens[:, :1], start_token(t3))
    embeds, conditioning = t3.prepare_input_embeds(
        t3_cond=t3_cond, text_tokens=text_tokens, speech_tokens=speech_tokens, cfg_weight=cfg_weight
    )
    if is_llama(t3):
        start = torch.full((1, 1), start_token(t3), dtype=torch.long, device=embeds.device)
        start = embed_tokens(t3, start, torch.zeros_like(start[0])).expand(embeds.size(0), 1, -1)
        embeds = torch.cat([embeds, start], dim=1)
    return embeds, conditioning


def check_text(t3: nn.Module, text_tokens: Tensor) -> Tensor:
    """Text tokens as (R, S) int64 on the model's device, start and stop present in every row."""
    text_tokens = torch.atleast_2d(text_tokens)
    names = ("start_text_token", "stop_text_token")
    found = torch.stack([(text_tokens == getattr(t3.hp, name)).sum() for name in names])
    for name, count in zip(names, found.tolist(), strict=True):  # one wait for the device
        if count < text_tokens.size(0):
            raise InvalidRequestError(
                f"The text tokens lack {name} ({getattr(t3.hp, name)}).",
                "T3 finds the text by it.",
                "Pad the tokens with start and stop as `generate` does.",
            )
    table = t3.text_pos_emb.emb.num_embeddings if is_llama(t3) else None
    if table is not None and text_tokens.size(1) > table:
        raise InvalidRequestError(
            f"The text has {text_tokens.size(1)} tokens, but the model has positions for {table}.",
            "",
            "Split it into sentences.",
        )
    return text_tokens.to(dtype=torch.long, device=t3.device)


def embed_tokens(t3: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    """Embeddings (N, D) of tokens (N, 1), each at its own speech position (Llama) or at none (GPT-2).

    ``positions``: (N,) int64 on the model's device, so that nothing is copied from the host at a step.
    """
    embeds = t3.speech_emb(tokens)[:, 0]
    if is_llama(t3):
        embeds = embeds + t3.speech_pos_emb.get_fixed_embedding(positions)[0]
    return embeds


def embedding_addresses(t3: nn.Module) -> tuple[int, ...]:
    """Fingerprint of the memory that ``embed_tokens`` reads."""
    tables = (t3.speech_emb.weight, t3.speech_pos_emb.emb.weight) if is_llama(t3) else (t3.speech_emb.weight,)
    return tuple(table.data_ptr() for table in tables)
