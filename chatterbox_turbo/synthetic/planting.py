"""Weights on which random models sample varied speech tokens, and stop where they are told.

Random weights alone sample nearly uniformly, never stop, and pick ids that S3Gen has no embedding for. Each
function here edits a freshly initialised module in place; numbers hold for a final norm of unit variance, where
a logit's standard deviation is the Euclidean norm of its row.
"""

from __future__ import annotations

import math
from typing import Any

SPEECH_VOCABULARY = 6561
"""Ids below it are speech; T3's start and stop, and unused ids, lie above."""

_SILENCE = 4299  # upstream's S3GEN_SIL
_LOGIT_STD = 2.5  # peaky enough that temperature, min-p, top-p and top-k all cut something
_STOP_AMPLITUDE = 1000.0  # against 32 for an embedding of 1024 channels, and up to 100 after the last layer
_ATTENTION_GAIN = 2.0  # default weights attend so evenly that text and voice hardly reach the logits
_WAVEFORM_STD = 0.1


def plant_t3(t3: Any, stop_after: int) -> None:
    """Make `t3` emit `stop_after` speech tokens, then the stop token (multilingual: at most two more)."""
    import torch

    dim, start = t3.dim, t3.hp.start_speech_token
    with torch.no_grad():
        head, embedding = t3.speech_head.weight, t3.speech_emb.weight
        head.normal_(0.0, _LOGIT_STD / math.sqrt(dim))
        # A token repels itself: the multilingual analyzer ends the speech at the first repetition.
        speech = embedding[:SPEECH_VOCABULARY]
        head[:SPEECH_VOCABULARY] -= speech / speech.norm(dim=1, keepdim=True)
        stop, valid = torch.randn(2, dim).sign() / math.sqrt(dim)
        if getattr(t3, "is_gpt", False):
            _plant_gpt2(t3, stop, stop_after, start)
        else:
            _plant_llama(t3, stop, valid, stop_after)


def _output_gain(layers: Any) -> float:
    """So that the layers' sum, which the planted directions have to stand out from, does not grow with their number."""
    return _ATTENTION_GAIN * math.sqrt(2 / len(layers))


def _plant_llama(t3: Any, stop: Any, valid: Any, stop_after: int) -> None:
    """Plant in `speech_pos_emb`, whose index n is added to the input that samples speech token n."""
    head, positions = t3.speech_head.weight, t3.speech_pos_emb.emb.weight
    positions += 16.0 * valid
    positions[:stop_after] -= 16.0 * stop
    positions[stop_after:] += _STOP_AMPLITUDE * stop
    head[SPEECH_VOCABULARY:] = -3.0 * valid
    head[t3.hp.stop_speech_token] = 3.0 * stop
    # The analyzer suppresses the stop token while attention has not reached the end of the text, which random
    # attention may never do. Silence comes second then, and its repetition makes the analyzer stop.
    head[_SILENCE] = 2.4 * stop
    for layer in t3.tfmr.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight *= _ATTENTION_GAIN
        layer.self_attn.o_proj.weight *= _output_gain(t3.tfmr.layers)


def _plant_gpt2(t3: Any, stop: Any, stop_after: int, start: int) -> None:
    """Make one attention head look back by `stop_after` positions, and raise the stop token's logit where it finds
    the start-of-speech token there.

    `wpe` counts from the voice's first token, so a fixed position would move with the length of the text. Channels
    0 to 59 carry the position as 30 random frequencies; head 0 of layer 0 rotates them back by `stop_after`
    positions to make its query and matches them against every key. Channel 60 marks position 0, where the head
    rests while it would look before the beginning. The difference of channels 62 and 63 marks the start token: the
    mean that layer norm subtracts cancels in it. Exact in half precision too.
    """
    import torch

    for block in t3.tfmr.h:
        block.attn.c_attn.weight *= _ATTENTION_GAIN
        block.attn.c_proj.weight *= _output_gain(t3.tfmr.h)
    dim, positions, frequencies = t3.dim, t3.tfmr.wpe.weight, 30
    omega = math.pi * torch.rand(frequencies)
    phase = torch.arange(len(positions))[:, None] * omega
    for table in (positions, t3.speech_emb.weight, t3.text_emb.weight, t3.cond_enc.spkr_enc.weight.T):
        table[:, :64] = 0.0
    t3.cond_enc.spkr_enc.bias[:64] = 0.0
    positions[:, :frequencies], positions[:, frequencies : 2 * frequencies] = phase.cos(), phase.sin()
    positions[0, 60] = 100.0  # far above the rest of that vector, so its layer norm is about sqrt(dim) for any voice
    t3.speech_emb.weight[start, 62], t3.speech_emb.weight[start, 63] = 8.0, -8.0

    block = t3.tfmr.h[0].attn
    query, key, value = block.c_attn.weight.view(dim, 3, dim)[:, :, :64].unbind(1)  # (channel in, channel of head 0)
    back = (omega * stop_after).cos().diag(), (omega * stop_after).sin().diag()
    for part in (query, key, value, block.c_proj.weight[:64]):
        part.zero_()
    gain = 4.0  # a match scores 30 * gain**2 / sqrt(64) = 60, position 0 about 45, chance matches about 30
    query[:60, :60] = gain * torch.cat([torch.cat([back[0], -back[1]], 1), torch.cat([back[1], back[0]], 1)])
    key[:60, :60] = gain * torch.eye(60)
    key[60, 60], block.c_attn.bias[60] = 1.0, 8.0 * 45.0 / math.sqrt(dim)
    value[62, 0], value[63, 0] = 1.0, -1.0
    block.c_proj.weight[0] = _STOP_AMPLITUDE / 16.0 * stop

    t3.speech_head.weight[t3.hp.stop_speech_token] = 4.0 * stop
    t3.speech_head.bias.zero_()
    t3.speech_head.bias[SPEECH_VOCABULARY:] = -40.0


def plant_s3gen(s3gen: Any) -> None:
    """Give the vocoder the gain of a trained one, and a voice of about 120 Hz.

    As initialised, the mel spectrogram dies out on the way, and what remains is a faint buzz that hardly depends on
    the tokens. Unit gain in the layers that change the number of channels brings the mel to the output. PerTh finds
    its watermark in audio of any level that does not clip; 0.1 is the level of speech.
    """
    import torch

    vocoder = s3gen.mel2wav
    with torch.no_grad():
        for layer in vocoder.ups:  # each output sample sums kernel / stride = 2 taps
            layer.weight = layer.weight / (layer.weight.std() * math.sqrt(2 * layer.in_channels))
        post = vocoder.conv_post
        post.weight = post.weight * (2.0 / (post.weight.std() * math.sqrt(7 * post.in_channels)))  # input std near 1/4
        # Upstream treats less than 10 Hz as unvoiced, and then drops the sine source altogether.
        vocoder.f0_predictor.classifier.weight *= 100.0
        vocoder.f0_predictor.classifier.bias += 120.0
        # The first half of the output is the log-magnitude, so a bias is a factor of the waveform.
        log_magnitude = post.bias[: vocoder.istft_params["n_fft"] // 2 + 1]
        log_magnitude -= 5.0
        waveform, _ = vocoder.inference(1.5 * torch.randn(1, 80, 50))  # one second, at the spread of the flow's mel
        log_magnitude += math.log(_WAVEFORM_STD / waveform.std().item())
