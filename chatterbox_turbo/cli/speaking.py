"""The model that a batch speaks with: loaded, optimized, with the voices that its lines name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .loading import Wanted, load_model
from .screen import Screen
from .voice_folder import VoiceFolder

if TYPE_CHECKING:
    from ..config import OptimizationConfig


def speaking_model(
    screen: Screen, wanted: Wanted, settings: OptimizationConfig, voices: VoiceFolder, names: Sequence[str]
) -> Any:
    """Load and apply.

    Raises: as ``load_model``, ``apply`` and ``VoiceFolder.load``.
    """
    from ..api import apply

    loaded = load_model(screen, wanted)
    with screen.step("preparing"), screen.quiet():
        apply(loaded.model, settings)
        voices.load(loaded.model, names)
    if loaded.kind == "synthetic":
        screen.print(f"model: {loaded.description}")
    return loaded.model
