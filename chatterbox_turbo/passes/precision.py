"""Number formats: half precision for the weights of T3, and TensorFloat-32 for everything while generating."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from ..runtime.half_precision import FORMATS, best_format
from ..runtime.tf32 import tf32
from ..upstream import t3_weights
from .base import Call, Context, Pass


class PrecisionPass(Pass):
    """Casts T3's matrices, and sets TF32 around each call; residuals, norms and sampling stay fp32.

    A half that cannot be had here does not keep the other from running; the report says so.
    """

    name = "precision"
    summary = "T3's weights in half precision; TensorFloat-32 while generating (CUDA, capability 8.0 and up)"

    needs = ("decoding",)  # for T3

    def check(self, context: Context) -> str:
        obstacles = self._obstacles(context)
        wanted = self._wanted(context)
        demanded = context.config.precision.enabled is True
        if obstacles and (demanded or len(obstacles) == len(wanted)):
            return "; ".join(obstacles.values())
        return ""

    def apply(self, context: Context) -> str:
        obstacles, remarks = self._obstacles(context), []
        if "t3" in self._wanted(context) and "t3" not in obstacles:
            name, reason = self._format(context)
            t3_weights.cast(context.parts.t3, FORMATS[name], context.journal)
            remarks.append(f"T3 in {name} ({reason})")
        if "tf32" in self._wanted(context) and "tf32" not in obstacles:
            context.scopes.append(scope)
            remarks.append("TF32")
        return "; ".join([*remarks, *(f"not {name}: {reason}" for name, reason in obstacles.items())])

    def _wanted(self, context: Context) -> list[str]:
        section = context.config.precision
        return ["t3"] * (section.t3 != "float32") + ["tf32"] * section.tf32

    def _format(self, context: Context) -> tuple[str, str]:
        best, reason = best_format(context.parts.device)
        wanted = context.config.precision.t3
        return (best if wanted == "auto" else wanted), reason

    def _obstacles(self, context: Context) -> dict[str, str]:
        """Why one half cannot run, by its option."""
        wanted, device, found = self._wanted(context), context.parts.device, {}
        if "t3" in wanted:
            name, reason = self._format(context)
            best, _ = best_format(device)
            if context.parts.t3 is None:
                found["t3"] = "the model has no T3"
            elif not best:
                found["t3"] = reason
            elif name == "float16" and best != "float16":
                found["t3"] = f"{best} is as fast here ({reason}), and float16 overflows where it does not"
            elif name != best:
                found["t3"] = f"{name} is emulated here ({reason}); float16 is not"
        if "tf32" in wanted:
            capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
            if device.type != "cuda":
                found["tf32"] = f"TF32 needs a CUDA device, the model is on {device}"
            elif capability[0] < 8:
                found["tf32"] = f"TF32 needs capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        return found


@contextmanager
def scope(call: Call):
    """TF32 around one call."""
    with tf32():
        yield
