"""Named configurations: the values that a preset gives to keys which the user leaves alone.

A preset never says how a pass works; it is exactly what a user could write into a configuration file.
"""

from __future__ import annotations

from typing import Any

from .sections import PRECISION_PARTS

_HALF = dict.fromkeys(PRECISION_PARTS, "auto")
_HALF_FOR_GOOD = {**_HALF, "originals": "discard"}

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"fidelity": "exact"},
    "auto": {"fidelity": "numerical"},
    "fast": {"fidelity": "lossy", "precision": _HALF},
    "low_vram": {
        "fidelity": "lossy",
        "quantization": {"t3": "auto", "originals": "discard"},
        "precision": _HALF_FOR_GOOD,
        "offload": {"mode": "idle"},
        "memory": {"profile": "aggressive"},
        "decoding": {"voice_bytes": 0},
    },
    "max_speed": {
        "fidelity": "lossy",
        "quantization": {"t3": "int4", "backend": "native"},
        "precision": _HALF,
        "flow": {"steps": 4, "prompt_seconds": 5.0},
    },
    "cpu_small": {
        "fidelity": "lossy",
        "quantization": {"t3": "int8", "originals": "discard"},
        "precision": _HALF_FOR_GOOD,
        "offload": {"mode": "idle"},
        "memory": {"profile": "aggressive"},
        "conditioning": {"cache_bytes": 16 * 2**20},
        "decoding": {"voice_bytes": 0},
    },
    "mps": {"fidelity": "numerical", "memory": {"profile": "balanced"}},
    "vram_2gb": {
        "fidelity": "lossy",
        "decoding": {"max_new_tokens": 400},
        "quantization": {"t3": "auto", "strategy": "aggressive", "originals": "discard"},
        "precision": _HALF_FOR_GOOD,
        "flow": {"batch_frames": 1500, "graphs": False},
        "vocoder": {"graphs": False},
        "offload": {"mode": "sequential"},
        "memory": {"profile": "aggressive"},
        "conditioning": {"cache_bytes": 4 * 2**20},
    },
    "vram_4gb": {
        "fidelity": "lossy",
        "precision": _HALF,
        "flow": {"batch_frames": 2500},
        "offload": {"mode": "idle"},
        "memory": {"profile": "balanced"},
        "conditioning": {"cache_bytes": 16 * 2**20},
    },
    "vram_6gb": {
        "fidelity": "lossy",
        "precision": {**_HALF, "tf32": True},
        "flow": {"batch_frames": 5000},
        "memory": {"profile": "balanced"},
    },
    "vram_8gb": {
        "fidelity": "lossy",
        "precision": {**_HALF, "tf32": True},
        "flow": {"batch_frames": 10000},
        "memory": {"profile": "balanced"},
    },
    "vram_12gb": {
        "fidelity": "lossy",
        "precision": {**_HALF, "tf32": True},
        "memory": {"profile": "balanced"},
        "conditioning": {"cache_bytes": 256 * 2**20},
        "warmup": {"level": "light"},
    },
    "vram_24gb": {
        "fidelity": "lossy",
        "precision": {**_HALF, "tf32": True},
        "flow": {"batch_frames": 64000},
        "conditioning": {"cache_bytes": 2**30},
        "warmup": {"level": "full"},
    },
}

DESCRIPTIONS = {
    "exact": "The same tokens and the same samples as upstream, without its defects.",
    "auto": "Every lossless pass that can run on this machine.",
    "fast": "As auto, with all that speaks in the half-precision format that this device is good at.",
    "low_vram": "The least memory: T3 in four bits a weight, the rest as in fast, voice encoders away while idle.",
    "max_speed": "As fast, with T3 in four bits on CPUs, 4 steps of flow matching, and 5 s of the voice's prompt.",
    "cpu_small": "A machine with 8 GB of RAM and no GPU: T3 in int8, the rest as in fast, freed memory given back.",
    "mps": "Apple's GPUs: the lossless set in fp32, freed memory given back when it is short.",
    "vram_2gb": "GPUs with 2 GB: T3 in four bits, flow in half precision, each part in its phase only, at most 16 s.",
    "vram_4gb": "GPUs with 4 GB: as fast; the audio of few utterances at once, memory given back when it is short.",
    "vram_6gb": "GPUs with 6 GB: as vram_4gb, with TF32, and the audio of twice as many utterances.",
    "vram_8gb": "GPUs with 8 GB: as vram_6gb, with twice as many.",
    "vram_12gb": "GPUs with 12 GB: as vram_8gb, with large batches, more voices and a warm-up.",
    "vram_24gb": "GPUs with 24 GB and more: as vram_12gb, with the largest batches and thousands of voices.",
}

DEFAULT = "auto"
