"""By which kernel attention is computed: the prefill of T3, the flow estimator, the encoder of speech tokens.

The passes decoding and flow build those parts, and are told here which kernel is wanted. Where it cannot be had, a part
keeps its own choice.
"""

from __future__ import annotations

import torch

from ..config import Fidelity
from ..runtime.device.attention_kernels import HALF, Wanted, why_not
from ..runtime.s3gen.speech_encoder import attention_format
from ..runtime.t3.transformer import prefill_format
from ..upstream import encoder_weights, flow_weights, t3_weights
from ..upstream import t3 as upstream_t3
from .base import Context, Pass
from .decoding import wants_static
from .precision import FORMATS, PrecisionPass

READERS = {"prefill": "decoding", "flow": "flow", "encoder": "flow"}  # which pass builds a part


class AttentionPass(Pass):
    """Tells decoding and flow which kernel is wanted; parts that cannot have it are reported, and the others run."""

    name = "attention"
    summary = "attention of prefill, flow and speech encoder by a kernel of your choice"
    needs = ("decoding", "flow")  # which read the choice; precision, whose formats matter, comes before by its place

    def fidelity(self, context: Context) -> Fidelity:
        section = context.config.attention
        readable = [part for part in section.parts if not self._unread(context, part)]
        # rounding to half precision in another order is no matter of 60 dB
        halves = any(self._format(context, part) in HALF for part in readable)
        return "lossy" if halves else section.promise

    def check(self, context: Context) -> str:
        obstacles = self._obstacles(context)
        demanded = context.config.attention.enabled is True
        if obstacles and (demanded or len(obstacles) == len(context.config.attention.parts)):
            return "; ".join(f"{part}: {reason}" for part, reason in obstacles.items())
        return ""

    def apply(self, context: Context) -> str:
        obstacles, section = self._obstacles(context), context.config.attention
        context.attention.update({part: self._wanted(context, part) for part in section.parts if part not in obstacles})
        remarks = [f"{part} by {wanted}" for part, wanted in context.attention.items()]
        remarks += [f"{part} not by {self._wanted(context, part)}: {reason}" for part, reason in obstacles.items()]
        return "; ".join(remarks)

    def _wanted(self, context: Context, part: str) -> Wanted:
        section = context.config.attention
        name = section.parts[part]
        return Wanted(name, section.kernel if name == "sdpa" else "auto")

    def _unread(self, context: Context, part: str) -> str:
        """Why nobody reads the choice for a part: upstream's own code computes it, or nothing does."""
        if part == "prefill" and context.parts.t3 is None:
            return "the model has no T3"
        if READERS[part] not in context.planned:
            return f"it needs the pass {READERS[part]}, which does not run here"
        if part == "prefill" and not wants_static(context.config):
            return "it needs the static backbone, and decoding computes on upstream's"
        return t3_weights.why_not(context.parts.t3, context.journal) if part == "prefill" else ""

    def _format(self, context: Context, part: str) -> torch.dtype:
        """The format that a part attends in, once the pass precision has run."""
        parts = context.parts
        if part == "prefill":
            option, format_now = "t3", t3_weights.format_of(parts.t3)
        else:
            option, weights = part, {"flow": flow_weights, "encoder": encoder_weights}[part]
            format_now = weights.format_of(parts.s3gen)
        name = PrecisionPass().format_for(context, option)
        dtype = FORMATS[name] if name else format_now
        narrow = {"prefill": prefill_format, "encoder": attention_format}.get(part)
        return dtype if narrow is None else narrow(dtype, parts.device)

    def _obstacles(self, context: Context) -> dict[str, str]:
        """Why a part cannot have its kernel, by the part's name."""
        found, parts = {}, context.parts
        widths = {
            "prefill": lambda: upstream_t3.head_width(parts.t3),
            "flow": lambda: flow_weights.head_width(parts.s3gen),
            "encoder": lambda: encoder_weights.head_width(parts.s3gen),
        }
        for part in context.config.attention.parts:
            reason = self._unread(context, part)
            if not reason:
                wanted, dtype = self._wanted(context, part), self._format(context, part)
                reason = why_not(wanted, dtype, parts.device, widths[part](), positions=part == "encoder")
            if reason:
                found[part] = reason
        return found
