"""What phases take on their way: activations, by formulas over lengths and widths.

Each term is a tensor of the code that it names, or was measured on full-size models on a CPU (torch 2.6, glibc);
``benchmarks/budget.py`` compares the sums with a process. No GPU has been measured.
"""

from __future__ import annotations

import torch

from ..passes import Context, vocos
from ..passes.flow import CPU_BATCH_FRAMES, CUDA_BATCH_FRAMES, FRAMES_PER_TOKEN
from ..passes.precision import PrecisionPass
from ..runtime.cpu.onednn import onednn_is_faster
from ..runtime.s3gen.vocos_network import VocosArchitecture
from ..runtime.t3.backbone import PREFILL_POSITIONS
from ..upstream import sizes
from ..upstream.families import Parts
from ..upstream.sizes import FlowSizes, TokenModelSizes, VocoderSizes

FLOAT = 4
LIBRARIES = 60 * 2**20  # code and buffers that the first request brings on a CPU, whatever its length
KEPT = 300 * 2**10  # bytes for a mel frame that convolutions on a CPU leave behind for the next ones
ACTIVATIONS = {"cpu": 17}  # of the vocoder's largest resolution at once; a CPU's convolutions lay theirs out anew
ELSEWHERE = 9
VOICE_SHARE = 0.25  # of the encoders' weights: what ten seconds of a voice take beside them
MARKED = 370 * 10**3  # bytes for a speech token, PerTh's spectra
UPSTREAM = 2.5  # times the scores: upstream's encoder pads, copies and shifts them
# frames of the longest that get a CUDA graph (flow_solver, vocoder_network, vocos_vocoder)
FLOW_GRAPH, VOCODER_GRAPH, VOCOS_GRAPH = 2048, 512, 1024


def by_phase(context: Context, tokens: int, slots: int) -> dict[str, int]:
    """Bytes by phase for speech of ``tokens``, ``slots`` utterances at once."""
    parts = context.parts
    taken = {"conditionals": _voice(parts), "flow": _flow(context, tokens, slots)}
    taken["vocoder"] = _vocoder(context, tokens, slots)
    if parts.device.type == "cpu" or context.config.watermark.device == "model":
        taken["watermark"] = MARKED * tokens
    if parts.t3 is not None:
        taken["t3"] = _tokens(sizes.of_token_model(parts.t3), tokens, slots, _quantized_width(context))
    return taken


def graph_pools(context: Context, tokens: int) -> int:
    """Bytes that CUDA graphs keep for themselves: what the longest captured lengths take (not measured on a GPU)."""
    config, total = context.config, 0
    flow = sizes.of_flow(context.parts)
    if "flow" in context.planned and config.flow.graphs:
        total += _estimator(flow, min(flow.prompt + FRAMES_PER_TOKEN * tokens, FLOW_GRAPH), 1, _flow_width(context))
    if (own := vocos.planned(context)) is not None and config.vocoder.graphs:
        total += _vocos(own.architecture, min(FRAMES_PER_TOKEN * tokens, VOCOS_GRAPH))
    elif "vocoder" in context.planned and config.vocoder.graphs and config.fidelity != "exact":
        shape = sizes.of_vocoder(context.parts.s3gen.mel2wav)
        total += ELSEWHERE * _activation(shape, min(FRAMES_PER_TOKEN * tokens, VOCODER_GRAPH))
    if "decoding" in context.planned and config.decoding.graphs and context.parts.t3 is not None:
        shape = sizes.of_token_model(context.parts.t3)
        total += 2 * shape.rows * config.budget_slots * (shape.vocabulary * 8 + shape.mlp * 4) * FLOAT
    return total


def _tokens(shape: TokenModelSizes, tokens: int, slots: int, matrix: int) -> int:
    """The prefill: embeddings, queries, keys, values, the MLP's hidden states, in fp32 (``transformer.prefill``)."""
    before, _ = shape.positions(tokens)
    rows = min(shape.rows * slots * before, max(PREFILL_POSITIONS, shape.rows * before))
    hidden = (3 if shape.gated else 2) * shape.mlp
    logits = 6 * shape.rows * slots * shape.vocabulary  # probabilities, sorted, and what a token is drawn from
    return rows * (6 * shape.width + hidden) * FLOAT + logits * FLOAT + matrix


def _quantized_width(context: Context) -> int:
    """Where torch multiplies, a whole matrix is made plain for each product."""
    if "quantization" not in context.planned or context.parts.device.type == "cpu":
        return 0
    shape = sizes.of_token_model(context.parts.t3)
    return 3 * shape.width * shape.mlp * FLOAT


def _flow_width(context: Context) -> int:
    return 2 if PrecisionPass().format_for(context, "flow") else FLOAT


def _flow(context: Context, tokens: int, slots: int) -> int:
    """The larger of encoder and velocity network; several utterances in batches of ``flow.batch_frames``."""
    shape, device = sizes.of_flow(context.parts), context.parts.device
    prompt = shape.prompt
    if context.config.flow.prompt_seconds is not None:
        prompt = min(prompt, int(context.config.flow.prompt_seconds * 50))
    frames = prompt + FRAMES_PER_TOKEN * tokens
    most = context.config.flow.batch_frames or (CUDA_BATCH_FRAMES if device.type == "cuda" else CPU_BATCH_FRAMES)
    together = max(1, min(slots, most // frames))
    return max(
        _encoder(context, shape, frames, together),
        _estimator(shape, frames, together, _flow_width(context)),
    )


def _encoder(context: Context, shape: FlowSizes, frames: int, rows: int) -> int:
    """At the frames' rate. Scores by content, and those by distance, which are twice as wide, of all heads; or where
    oneDNN multiplies, those of one head at a time, and their softmax."""
    one_by_one = "flow" in context.planned and context.parts.device.type == "cpu"
    one_by_one = one_by_one and onednn_is_faster(torch.get_num_threads())
    scores = 4.0 if one_by_one else 3.0 * shape.encoder_heads * rows
    if "flow" not in context.planned:
        scores *= UPSTREAM
    plain = rows * frames * (12 * shape.encoder_width + 2 * shape.encoder_mlp) + 4 * frames * shape.encoder_width
    return int((scores * frames * frames + plain) * FLOAT)


def _estimator(shape: FlowSizes, frames: int, utterances: int, width: int) -> int:
    """Residuals and constants in fp32; projections, and copies of them by head, in the weights' format."""
    rows = shape.rows * utterances
    scores = 2 * frames * frames * FLOAT if width == FLOAT else 0  # of one head, and their softmax
    return rows * frames * (8 * shape.channels * FLOAT + (7 * shape.inner + 2 * shape.mlp) * width) + scores


def _vocoder(context: Context, tokens: int, slots: int) -> int:
    """On a GPU in batches of ``flow.batch_frames``, elsewhere likewise."""
    if (own := vocos.planned(context)) is not None:
        return _vocos(own.architecture, _frames_at_once(context, tokens, slots))
    shape, kind = sizes.of_vocoder(context.parts.s3gen.mel2wav), context.parts.device.type
    count = ACTIVATIONS.get(kind, ELSEWHERE)
    return count * _activation(shape, _frames_at_once(context, tokens, slots)) - kept(context, tokens, slots)


def _vocos(size: VocosArchitecture, frames: int) -> int:
    """The hidden states of a block before and behind their activation, or the spectra and windows (not measured)."""
    return frames * FLOAT * max(4 * size.dim + 2 * size.intermediate_dim, 6 * size.n_fft)


def kept(context: Context, tokens: int, slots: int) -> int:
    """Bytes that stay in the process after the first vocoder."""
    if context.parts.device.type != "cpu" or vocos.planned(context) is not None:
        return 0
    shape = sizes.of_vocoder(context.parts.s3gen.mel2wav)
    largest = max(rate * channels for rate, channels in shape.levels)
    return KEPT * _frames_at_once(context, tokens, slots) * largest // LARGEST


LARGEST = 120 * 64  # numbers of the largest resolution for a mel frame, of the models that were measured


def _frames_at_once(context: Context, tokens: int, slots: int) -> int:
    cuda, frames = context.parts.device.type == "cuda", FRAMES_PER_TOKEN * tokens
    most = context.config.flow.batch_frames or (CUDA_BATCH_FRAMES if cuda else CPU_BATCH_FRAMES)
    return frames * max(1, min(slots, most // frames))


def _activation(shape: VocoderSizes, frames: int) -> int:
    """One of the largest resolution."""
    return max(rate * channels for rate, channels in shape.levels) * frames * FLOAT


def _voice(parts: Parts) -> int:
    """Ten seconds through the speech tokenizer and the speaker encoder."""
    encoders = (parts.s3gen.tokenizer, parts.s3gen.speaker_encoder)
    return int(VOICE_SHARE * sum(p.numel() * p.element_size() for one in encoders for p in one.parameters()))
