"""What a user may ask for: sections (one a pass), the whole with its cross-field rules, presets, files, messages.

Values come in from files, the environment, presets and dictionaries, and leave as one frozen ``OptimizationConfig``.
Nothing here imports torch, a pass, or anything of upstream: what a section's options do is its pass's business.
"""

from .model import OptimizationConfig, merge
from .presets import DEFAULT, DESCRIPTIONS, PRESETS
from .resolution import Config, resolve
from .sections import (
    FIDELITIES,
    PRECISION_PARTS,
    DecodingSection,
    Fidelity,
    FlowSection,
    MemorySection,
    OffloadSection,
    Section,
    TextSection,
    VocoderSection,
    exceeds,
)

__all__ = [
    "DEFAULT",
    "DESCRIPTIONS",
    "FIDELITIES",
    "PRECISION_PARTS",
    "PRESETS",
    "Config",
    "DecodingSection",
    "Fidelity",
    "FlowSection",
    "MemorySection",
    "OffloadSection",
    "OptimizationConfig",
    "Section",
    "TextSection",
    "VocoderSection",
    "exceeds",
    "merge",
    "resolve",
]
