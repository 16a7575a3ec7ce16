"""Real upstream models with seeded random weights, for tests, demos and benchmarks without a checkpoint.

Classes and architectures are upstream's; weights are drawn, and planted so that speech ends where it is asked to.
Nothing of the optimizations is known here.
"""

from .architecture import SHALLOW, SIZES, architecture
from .checkpoint import FAMILIES, build, save
from .recording import reference_voice

__all__ = ["FAMILIES", "SHALLOW", "SIZES", "architecture", "build", "reference_voice", "save"]
