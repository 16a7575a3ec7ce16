"""Number formats: half precision for T3 and for the flow estimator, and TensorFloat-32 while generating."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from ..runtime.device.half_precision import FORMATS, best_format
from ..runtime.device.tf32 import tf32
from ..upstream import flow_weights, t3_weights
from .base import Call, Context, Pass

TITLES = {"t3": "T3", "flow": "flow estimator"}


class PrecisionPass(Pass):
    """Casts matrices, and sets TF32 around each call; residuals, norms, sampling and Euler's state stay fp32.

    What cannot be had here does not keep the rest from running; the report says so.
    """

    name = "precision"
    summary = "T3 and flow estimator in half precision; TensorFloat-32 while generating (CUDA, capability 8.0 and up)"

    needs = ("decoding", "flow")  # which read the weights that are cast

    def check(self, context: Context) -> str:
        obstacles = self._obstacles(context)
        wanted = self._wanted(context)
        demanded = context.config.precision.enabled is True
        if obstacles and (demanded or len(obstacles) == len(wanted)):
            return "; ".join(obstacles.values())
        return ""

    def apply(self, context: Context) -> str:
        obstacles, remarks = self._obstacles(context), []
        for part, title in TITLES.items():
            if part in self._wanted(context) and part not in obstacles:
                name, reason = self._format(context, part)
                if part == "t3":
                    t3_weights.cast(context.parts.t3, FORMATS[name], context.journal)
                else:
                    flow_weights.cast(context.parts.s3gen, FORMATS[name], context.journal)
                remarks.append(f"{title} in {name} ({reason})")
        if "tf32" in self._wanted(context) and "tf32" not in obstacles:
            context.scopes.append(scope)
            remarks.append("TF32")
        return "; ".join([*remarks, *(f"not {name}: {reason}" for name, reason in obstacles.items())])

    def _wanted(self, context: Context) -> list[str]:
        section = context.config.precision
        halves = [part for part in TITLES if getattr(section, part) != "float32"]
        return [*halves, *["tf32"] * section.tf32]

    def _format(self, context: Context, part: str) -> tuple[str, str]:
        best, reason = best_format(context.parts.device)
        wanted = getattr(context.config.precision, part)
        return (best if wanted == "auto" else wanted), reason

    def _unread(self, context: Context, part: str) -> str:
        """Why nobody would read a part's weights in half precision: upstream's own code cannot."""
        reader = {"t3": "decoding", "flow": "flow"}[part]
        if reader not in context.planned:
            return f"{TITLES[part]} in half precision needs the pass {reader}, which does not run here"
        return t3_weights.why_not(context.parts.t3, context.journal) if part == "t3" else ""

    def _obstacles(self, context: Context) -> dict[str, str]:
        """Why a part cannot run, by its option."""
        wanted, device, found = self._wanted(context), context.parts.device, {}
        for part in (part for part in wanted if part in TITLES):
            name, reason = self._format(context, part)
            best, _ = best_format(device)
            if part == "t3" and context.parts.t3 is None:
                found[part] = "the model has no T3"
            elif unread := self._unread(context, part):
                found[part] = unread
            elif not best:
                found[part] = reason
            elif name == "float16" and best != "float16":
                found[part] = f"{best} is as fast here ({reason}), and float16 overflows where it does not"
            elif name != best:
                found[part] = f"{name} is emulated here ({reason}); float16 is not"
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
