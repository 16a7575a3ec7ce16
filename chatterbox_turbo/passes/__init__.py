"""The passes of this package, in the order in which they are applied."""

from .alignment import AlignmentPass
from .attention import AttentionPass
from .base import Call, Context, Pass
from .conditioning import ConditioningPass
from .decoding import DecodingPass
from .flow import FlowPass
from .memory import MemoryPass
from .offload import OffloadPass
from .precision import PrecisionPass
from .quantization import QuantizationPass
from .text import TextPass
from .vocoder import VocoderPass
from .warmup import WarmupPass
from .watermark import WatermarkPass

# memory decides what is kept before others allocate, and gives back after them; quantization replaces layers; precision
# casts what decoding and flow then fuse and measure; attention tells them by which kernel they attend; decoding
# replaces the token loop, alignment wraps whatever loop is there; offload moves what all of them have laid out; warmup
# runs what all others built
ALL_PASSES: tuple[Pass, ...] = (
    MemoryPass(),
    QuantizationPass(),
    PrecisionPass(),
    AttentionPass(),
    DecodingPass(),
    AlignmentPass(),
    TextPass(),
    FlowPass(),
    VocoderPass(),
    ConditioningPass(),
    WatermarkPass(),
    OffloadPass(),
    WarmupPass(),
)

__all__ = ["ALL_PASSES", "Call", "Context", "Pass"]
