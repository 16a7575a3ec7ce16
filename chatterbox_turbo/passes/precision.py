"""Number formats: what speaks in half precision or under autocast, TensorFloat-32 while generating."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..runtime.device.autocasting import autocast, why_no_autocast
from ..runtime.device.half_precision import FORMATS, best_format
from ..runtime.device.tf32 import tf32
from ..upstream import encoder_weights, flow_weights, t3_weights
from ..upstream.parameters import Cast
from .base import Context, Pass

TITLES = {"t3": "T3", "flow": "flow estimator", "encoder": "flow encoder", "vocoder": "vocoder's residual blocks"}
# the passes that compute with a part's weights
READERS = {"t3": "decoding", "flow": "flow", "encoder": "flow", "vocoder": "vocoder"}
AUTOCAST = {part: f"autocast of {TITLES[part]}" for part in ("t3", "flow")}


class Originals:
    """What was cast, and where its original weights are, for the report."""

    def __init__(self, casts: Sequence[Cast]):
        self._casts, self._bytes = casts, sum(cast.nbytes for cast in casts)

    def remarks(self) -> list[str]:
        """Bytes kept on the host, or given up, as things are now."""
        if not self._bytes:
            return []
        kept = sum(cast.nbytes for cast in self._casts)
        if kept:
            return [f"original weights kept on the host ({kept / 2**20:.1f} MiB)"]
        return [f"original weights given up ({self._bytes / 2**20:.1f} MiB): reverting gives rounded ones"]


class PrecisionPass(Pass):
    """Casts matrices, and allows TF32 while the model computes; residuals, norms, sampling and Euler's state stay fp32.

    What cannot be had here does not keep the rest from running; the report says so.
    """

    name = "precision"
    summary = "T3, flow and vocoder in half precision; TensorFloat-32 while generating (CUDA, capability 8.0 and up)"

    needs = ("decoding", "flow", "vocoder")  # which read the weights in half precision

    def check(self, context: Context) -> str:
        obstacles = self._obstacles(context)
        wanted = self._wanted(context)
        demanded = context.config.precision.enabled is True
        if obstacles and (demanded or len(obstacles) == len(wanted)):
            return "; ".join(obstacles.values())
        return ""

    def apply(self, context: Context) -> str:
        obstacles, remarks, casts = self._obstacles(context), [], []
        for part, title in TITLES.items():
            if part in self._wanted(context) and part not in obstacles:
                name, reason = self._format(context, part)
                if part != "vocoder":  # whose pass copies what it computes with
                    casts.append(self._cast(context, part, name))
                remarks.append(f"{title} in {name} ({reason})")
        remarks += self._autocast(context, obstacles)
        if "tf32" in self._wanted(context) and "tf32" not in obstacles:
            context.settings.append(tf32)
            remarks.append("TF32")
        remarks += [f"not {name}: {reason}" for name, reason in obstacles.items()]
        context.holdings["original weights"] = originals = Originals(casts)
        context.remarks[self.name] = lambda: "; ".join([*remarks, *originals.remarks()])
        return context.remarks[self.name]()

    def _cast(self, context: Context, part: str, name: str) -> Cast:
        """Cast a part, and have its original weights let go of where that is asked for."""
        s3gen, dtype, journal = context.parts.s3gen, FORMATS[name], context.journal
        if part == "t3":
            owner = context.parts.t3
            made = t3_weights.cast(owner, dtype, journal)
        elif part == "encoder":
            owner, made = encoder_weights.encoder_of(s3gen), encoder_weights.cast(s3gen, dtype, journal)
        else:
            owner, made = flow_weights.estimator_of(s3gen), flow_weights.cast(s3gen, dtype, journal)
        if context.config.precision.originals == "discard":
            context.journal.give_up(f"{TITLES[part]} ({name})", owner, made.forget)
        return made

    def _autocast(self, context: Context, obstacles: dict[str, str]) -> list[str]:
        """Have autocast around the parts that it is asked for and possible for; the remarks."""
        section, device = context.config.precision, context.parts.device.type
        wanted = self._wanted(context)
        parts = [part for part, name in AUTOCAST.items() if name in wanted and name not in obstacles]
        for part in parts:
            context.around[part] = partial(autocast, device, FORMATS[section.autocast])
        titles = " and ".join(TITLES[part] for part in parts)
        by = "every product casts its fp32 weights, by torch's own operations, without CUDA graphs"
        return [f"{titles} under autocast to {section.autocast} ({by})"] if parts else []

    def _wanted(self, context: Context) -> list[str]:
        section = context.config.precision
        autocasts = list(AUTOCAST.values()) if section.autocast else []
        return [*section.halved, *autocasts, *["tf32"] * section.tf32]

    def _format(self, context: Context, part: str) -> tuple[str, str]:
        best, reason = best_format(context.parts.device)
        wanted = getattr(context.config.precision, part)
        return (best if wanted == "auto" else wanted), reason

    def _unread(self, context: Context, part: str) -> str:
        """Why nobody would read a part's weights in half precision: upstream's own code cannot."""
        reader = READERS[part]
        if reader not in context.planned:
            return f"{TITLES[part]} in half precision needs the pass {reader}, which does not run here"
        if part == "vocoder" and context.config.vocoder.kind == "vocos":
            return "Vocos computes in float32"
        return t3_weights.why_not(context.parts.t3, context.journal) if part == "t3" else ""

    def _why_no_autocast(self, context: Context, part: str) -> str:
        if part == "t3" and context.parts.t3 is None:
            return "the model has no T3"
        if READERS[part] not in context.planned:
            return f"{AUTOCAST[part]} needs the pass {READERS[part]}, which does not run here"
        return why_no_autocast(context.parts.device, FORMATS[context.config.precision.autocast])

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
        for part, name in AUTOCAST.items():
            if name in wanted and (reason := self._why_no_autocast(context, part)):
                found[name] = reason
        if "tf32" in wanted:
            capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
            if device.type != "cuda":
                found["tf32"] = f"TF32 needs a CUDA device, the model is on {device}"
            elif capability[0] < 8:
                found["tf32"] = f"TF32 needs capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        return found

    def format_for(self, context: Context, part: str) -> str:
        """The half-precision format of a part (``TITLES``), empty where it is left as it is."""
        wanted = "precision" in context.planned and part in self._wanted(context)
        return self._format(context, part)[0] if wanted and part not in self._obstacles(context) else ""
