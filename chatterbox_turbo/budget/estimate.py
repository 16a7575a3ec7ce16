"""What a model will have in memory, from the shapes of its parameters and what passes make of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..passes import Context, vocos
from ..passes.decoding import wants_static
from ..passes.offload import leaving
from ..passes.precision import PrecisionPass
from ..passes.quantization import QuantizationPass
from ..runtime.cpu.threads import why_no_kernels
from ..runtime.device.offload import SPEAKING, VOICE
from ..runtime.device.overlay import SMALLEST
from ..runtime.device.quantized import SCHEMES, QuantizedLinear
from ..runtime.t3.backbone import padded
from ..runtime.t3.kv_cache import bucketed
from ..runtime.t3.voice_prefixes import LEAST
from ..upstream import encoder_weights, flow_weights, sizes, t3_weights
from ..upstream.t3_quantization import schemes
from . import work

# by the meter's name, offload's
PHASES = {"conditionals": VOICE, "t3": "t3", "flow": "flow", "vocoder": "vocoder", "watermark": "vocoder"}


@dataclass(frozen=True)
class Phase:
    """Bytes while a phase computes: weights that are there, T3's cache, everything that is made on the way."""

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.work


@dataclass(frozen=True)
class Estimate:
    """Bytes on a model's device.

    Attributes:
        parts: weights by part, whether there or away.
        always: what is there in every phase beside weights: ``copies`` that passes make of weights, ``originals`` for
            revert (on a CPU), ``voices`` at most, ``graph pools``, and what ``libraries`` keep (on a CPU).
        phases: by phase of a request, and ``conditionals``: a voice is encoded.
        tokens, slots: the longest speech, and utterances at once.
    """

    parts: dict[str, int]
    always: dict[str, int]
    phases: dict[str, Phase]
    tokens: int
    slots: int

    @property
    def weights(self) -> int:
        """All of them, there or away."""
        return sum(self.parts.values())

    def by_phase(self) -> dict[str, int]:
        """Everything that is there, by phase."""
        return {name: phase.total + sum(self.always.values()) for name, phase in self.phases.items()}

    @property
    def needed(self) -> int:
        """The most of all phases: the smallest budget that would do."""
        return max(self.by_phase().values())

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        phases = {name: {**vars(phase), "total": self.by_phase()[name]} for name, phase in self.phases.items()}
        own = {"weights": self.weights, "needed": self.needed, "phases": phases}
        return {"parts": self.parts, "always": self.always, "tokens": self.tokens, "slots": self.slots, **own}


def estimate(context: Context) -> Estimate:
    """The memory of a model to which ``context.config`` is applied, with the passes that ``context.planned`` names.

    Weights are exact; caches follow from lengths; what phases take on their way is a formula (``work``). The context's
    model must be as it was before ``apply``.
    """
    parts, config, device = context.parts, context.config, context.parts.device
    after, originals = _after(context)
    present = {
        name: sum(after.get(id(t), _size(t)) for t in _own(module) if t.device.type == device.type)
        for name, module in parts.modules().items()
    }
    if (own := vocos.planned(context)) is not None:
        if not vocos.why_hift_stays(context):
            cuda = device.type == "cuda"
            present["s3gen.mel2wav"] -= sum(_moved(tensor, after, cuda) for tensor in vocos.hift_tensors(context))
        present["vocos"] = own.bytes
    tokens, slots = config.decoding.max_new_tokens or sizes.LONGEST, config.budget_slots
    always = {
        "copies": _copies(context),
        "originals": originals if device.type == "cpu" else 0,
        "voices": config.conditioning.cache_bytes if "conditioning" in context.planned else 0,
        "voices in T3": _voices(context),
        "graph pools": work.graph_pools(context, tokens) if device.type == "cuda" else 0,
        "libraries": work.LIBRARIES + work.kept(context, tokens, slots) if device.type == "cpu" else 0,
    }
    away = _away(context, after)
    cache = _cache(context, tokens, slots)
    stays = device.type != "cpu"  # there a cache is kept for the next request
    taken = work.by_phase(context, tokens, slots)
    phases = {
        name: Phase(
            sum(present.values()) - away.get(name, 0), cache if stays or name == "t3" else 0, taken.get(name, 0)
        )
        for name in PHASES
        if name in taken
    }
    return Estimate(present, always, phases, tokens, slots)


def _own(module: Any) -> Iterable[Tensor]:
    """Parameters and buffers, each once."""
    return {(t.data_ptr(), t.numel()): t for t in (*module.parameters(), *module.buffers())}.values()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _after(context: Context) -> tuple[dict[int, int], int]:
    """Bytes of each weight that a pass changes, by its id, and of what is kept for revert."""
    after: dict[int, int] = {}
    kept, parts, config = 0, context.parts, context.config
    if "quantization" in context.planned:
        scheme = SCHEMES[QuantizationPass().scheme(context)]
        for chosen in QuantizationPass().chosen(context):
            for owner, name in chosen:
                layer = getattr(owner, name)
                if not isinstance(layer, QuantizedLinear):
                    after[id(layer.weight)] = scheme.nbytes(*_shape(layer))
                    kept += _size(layer.weight) if config.quantization.originals == "host" else 0
    readers = {
        "t3": lambda: t3_weights.matrices(parts.t3),
        "flow": lambda: list(flow_weights.matrices(flow_weights.estimator_of(parts.s3gen))),
        "encoder": lambda: list(encoder_weights.matrices(encoder_weights.encoder_of(parts.s3gen))),
    }
    for part, matrices in readers.items():
        name = PrecisionPass().format_for(context, part)
        for weight in matrices() if name else ():
            if id(weight) not in after and weight.element_size() == 4:
                after[id(weight)] = weight.numel() * 2
                if config.precision.originals == "host":  # bf16 keeps what it dropped, fp16 the original
                    kept += weight.numel() * (2 if name == "bfloat16" else 4)
    return after, kept


def _shape(layer: Any) -> tuple[int, int]:
    """(out, in); GPT-2's layers keep theirs the other way round."""
    rows, columns = layer.weight.shape
    return (rows, columns) if hasattr(layer, "out_features") else (columns, rows)


def _away(context: Context, after: dict[int, int]) -> dict[str, int]:
    """Bytes that are not in memory, by phase."""
    if "offload" not in context.planned:
        return {}
    cuda, mode = context.parts.device.type == "cuda", context.config.offload.mode
    leaves = {
        phase: sum(_moved(t, after, cuda) for t in tensors)
        for phase, tensors in leaving(context.parts, keep_first=cuda).items()
    }
    if (own := vocos.planned(context)) is not None:
        leaves["vocoder"] = own.bytes
    speaking = sum(leaves.get(name, 0) for name in SPEAKING)
    if mode != "sequential":  # adaptive begins as idle
        return {name: 0 if own == VOICE else leaves.get(VOICE, 0) for name, own in PHASES.items()}
    if cuda:  # one region that is always there, as large as T3, or as flow and vocoder together
        region = max(leaves.get("t3", 0), speaking - leaves.get("t3", 0))
        return {n: speaking - region + (0 if own == VOICE else leaves.get(VOICE, 0)) for n, own in PHASES.items()}
    return {name: sum(leaves.values()) - leaves.get(own, 0) for name, own in PHASES.items()}


def _moved(tensor: Tensor, after: dict[int, int], cuda: bool) -> int:
    size = after.get(id(tensor), _size(tensor))
    return 0 if cuda and size < SMALLEST else size


def _copies(context: Context) -> int:
    """What passes make of weights and keep beside them."""
    parts, total = context.parts, 0
    if "flow" in context.planned:  # the first convolution is split in two
        first = flow_weights.estimator_of(parts.s3gen).down_blocks[0][0]
        total += sum(_size(conv.weight) for conv in (first.block1.block[0], first.res_conv))
    hift = "vocoder" in context.planned and vocos.planned(context) is None
    if hift:  # weight normalization is folded, on a CPU of what is computed in half precision
        half = bool(PrecisionPass().format_for(context, "vocoder"))
        for name, weight in parts.s3gen.mel2wav.named_parameters():
            halved = half and "resblocks." in name
            if name.endswith("parametrizations.weight.original1") and (halved or parts.device.type != "cpu"):
                total += _size(weight) // 2 if halved else _size(weight)
    if "watermark" in context.planned and context.config.watermark.device == "model":
        total += WATERMARK
    return total


WATERMARK = 9 * 2**20  # PerTh's encoder and the matrices of the resampling


def _cache(context: Context, tokens: int, slots: int) -> int:
    """T3's keys and values for speech of ``tokens``, ``slots`` at once."""
    t3, device = context.parts.t3, context.parts.device
    if t3 is None:
        return 0
    shape = sizes.of_token_model(t3)
    _, positions = shape.positions(tokens)
    rows, width = shape.rows * slots, t3_weights.format_of(t3).itemsize
    if "decoding" in context.planned and wants_static(context.config):
        width = 2 if PrecisionPass().format_for(context, "t3") else width
        if device.type == "cpu" and not _by_kernels(context):
            width = 4  # what torch's step reads; where the fastest is measured, it may be that one for some batches
        if device.type != "cpu":  # on a CPU room is not memory before it is written
            rows, positions = shape.rows * (padded(slots) if device.type == "cuda" else slots), bucketed(positions)
    return 2 * shape.layers * rows * positions * shape.width * width


def _voices(context: Context) -> int:
    """What T3 keeps of voices between requests."""
    static = "decoding" in context.planned and wants_static(context.config)
    if not static or context.parts.device.type != "cpu":
        return 0
    shape = sizes.of_token_model(context.parts.t3)
    return context.config.decoding.voice_bytes if shape.rows == 1 and shape.prefix >= LEAST else 0


def _by_kernels(context: Context) -> bool:
    """Whether the step of a CPU is this package's kernels for any number of rows, whatever is measured."""
    kernel = context.config.decoding.kernel
    quantized = "quantization" in context.planned or schemes(context.parts.t3)
    return not why_no_kernels() and (kernel == "numba" or (kernel == "auto" and bool(quantized)))
