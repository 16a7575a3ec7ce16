"""From a text of any length to pieces that are spoken one by one: where to cut, how long each is, how long to pause.

What lives here knows characters and languages only: no torch, no chatterbox, no passes, no audio. A piece's length is
estimated in speech tokens (25 a second), which ``Estimate`` learns from pieces that have been spoken.
"""

from __future__ import annotations

from .estimate import TOKENS_PER_SECOND, Estimate, estimate_tokens
from .normalization import NORMALIZED_LANGUAGES, normalize
from .options import PAUSES, Splitting
from .pieces import Piece, Span
from .sentences import INSTALL
from .splitting import pieces, split

__all__ = [
    "INSTALL",
    "NORMALIZED_LANGUAGES",
    "PAUSES",
    "TOKENS_PER_SECOND",
    "Estimate",
    "Piece",
    "Span",
    "Splitting",
    "estimate_tokens",
    "normalize",
    "pieces",
    "split",
]
