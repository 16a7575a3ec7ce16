"""Named configurations: the values that a preset gives to keys which the user leaves alone.

A preset never says how a pass works; it is exactly what a user could write into a configuration file.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"fidelity": "exact"},
    "auto": {"fidelity": "numerical"},
    "fast": {"fidelity": "lossy", "precision": {"t3": "auto", "flow": "auto"}},
}

DESCRIPTIONS = {
    "exact": "The same tokens and the same samples as upstream, without its defects.",
    "auto": "Every lossless pass that can run on this machine. Used when no configuration is given.",
    "fast": "As auto, with T3 and the flow estimator in the half-precision format that this device is good at.",
}

DEFAULT = "auto"
