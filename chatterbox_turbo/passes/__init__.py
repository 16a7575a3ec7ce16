"""The passes of this package, in the order in which they are applied."""

from .alignment import AlignmentPass
from .base import Call, Context, Pass
from .conditioning import ConditioningPass
from .decoding import DecodingPass
from .flow import FlowPass
from .precision import PrecisionPass
from .vocoder import VocoderPass
from .warmup import WarmupPass
from .watermark import WatermarkPass

# precision casts what decoding and flow then fuse and measure; decoding replaces the token loop, alignment
# wraps whatever loop is there; warmup runs what all others built
ALL_PASSES: tuple[Pass, ...] = (
    PrecisionPass(),
    DecodingPass(),
    AlignmentPass(),
    FlowPass(),
    VocoderPass(),
    ConditioningPass(),
    WatermarkPass(),
    WarmupPass(),
)

__all__ = ["ALL_PASSES", "Call", "Context", "Pass"]
