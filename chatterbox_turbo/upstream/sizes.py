"""Numbers of an architecture that the memory of its work depends on, read from its modules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from . import t3 as upstream_t3
from .families import Parts
from .flow_weights import estimator_of, is_mean_flow

PERCEIVER = 32  # positions that Llama's perceiver makes of the prompt's speech tokens
LONGEST = 1000  # speech tokens that generate of every family asks for: 40 s
TEXT_PER_TOKEN = 0.4  # text tokens for a speech token: 15 characters a second by 1.5 characters a text token


@dataclass(frozen=True)
class TokenModelSizes:
    """T3. ``rows``: of one utterance, with guidance; ``prefix``: positions before the text."""

    layers: int
    width: int
    mlp: int
    gated: bool
    vocabulary: int
    rows: int
    prefix: int

    def positions(self, tokens: int) -> tuple[int, int]:
        """Positions of prefix and text before ``tokens`` speech tokens, and of all together."""
        before = self.prefix + int(tokens * TEXT_PER_TOKEN)
        return before, before + tokens


@dataclass(frozen=True)
class FlowSizes:
    """Encoder and velocity network. ``rows``: of one utterance, with guidance; ``prompt``: frames of the voice."""

    rows: int
    channels: int
    inner: int
    mlp: int
    heads: int
    encoder_width: int
    encoder_mlp: int
    encoder_heads: int
    prompt: int


@dataclass(frozen=True)
class VocoderSizes:
    """HiFT. ``levels``: (frames for a mel frame, channels) by resolution."""

    levels: tuple[tuple[int, int], ...]


def of_token_model(t3: nn.Module) -> TokenModelSizes:
    """Of T3."""
    config, llama = t3.tfmr.config, upstream_t3.is_llama(t3)
    prompt = int(t3.hp.speech_cond_prompt_len or 0)
    return TokenModelSizes(
        layers=len(t3.tfmr.layers if llama else t3.tfmr.h),
        width=config.hidden_size,
        mlp=config.intermediate_size if llama else (config.n_inner or 4 * config.hidden_size),
        gated=llama,
        vocabulary=t3.speech_head.weight.size(0),
        rows=2 if llama else 1,
        prefix=PERCEIVER + 4 if llama else prompt + 2,
    )


def of_flow(parts: Parts) -> FlowSizes:
    """Of S3Gen's flow; without a voice on the model, of ten seconds."""
    estimator, encoder = estimator_of(parts.s3gen), parts.s3gen.flow.encoder
    block, layer = estimator.down_blocks[0][1][0], encoder.encoders[0]
    reference = parts.voice if isinstance(parts.voice, dict) else getattr(parts.voice, "gen", None)
    features = (reference or {}).get("prompt_feat")
    return FlowSizes(
        rows=1 if is_mean_flow(parts.s3gen) else 2,
        channels=estimator.final_proj.in_channels,
        inner=block.attn1.to_q.out_features,
        mlp=block.ff.net[0].proj.out_features,
        heads=block.attn1.heads,
        encoder_width=encoder.after_norm.weight.numel(),
        encoder_mlp=layer.feed_forward.w_1.out_features,
        encoder_heads=layer.self_attn.h,
        prompt=500 if features is None else features.shape[1],
    )


def of_vocoder(mel2wav: nn.Module) -> VocoderSizes:
    """Of the vocoder."""
    levels, frames = [], 1
    for up in mel2wav.ups:
        frames *= up.stride[0]
        levels.append((frames, up.out_channels))
    return VocoderSizes(tuple(levels))
