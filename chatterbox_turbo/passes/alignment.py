"""The multilingual analyzer without what it leaves behind: same decisions, constant cost a call.

Upstream registers three forward hooks for every call and never removes them, and switches the backbone to
eager attention with maps for good (``alignment_stream_analyzer.py``). Here both end with the call.
"""

from __future__ import annotations

from torch import nn

from ..upstream import alignment, t3
from .base import Context, Pass


class AlignmentPass(Pass):
    """Contains each analyzer within the call that built it, and takes away hooks of earlier calls."""

    name = "alignment"
    summary = "multilingual analyzer without leaked hooks and lasting attention switches"
    families = ("multilingual",)
    patch_points = ("t3.inference",)

    def check(self, context: Context) -> str:
        if alignment.analyzer_class(context.parts.t3) is None:
            return "this release of chatterbox-tts has no alignment analyzer"
        return ""

    def apply(self, context: Context) -> str:
        backbone = t3.backbone(context.parts.t3)
        stale = alignment.analyzer_hooks(backbone)
        for module, key in stale:
            _take_out(context, module, key)

        def around(wrapped, instance, args, kwargs):
            with alignment.contained(backbone):
                return wrapped(*args, **kwargs)

        context.journal.wrap(context.parts.t3, "inference", around)
        return f"took out {len(stale)} hooks of earlier calls" if stale else ""


def _take_out(context: Context, module: nn.Module, key: int) -> None:
    hooks = module._forward_hooks
    order, hook = list(hooks), hooks[key]

    def put_back() -> None:
        hooks[key] = hook
        for other in order[order.index(key) + 1 :]:  # hooks run in their order of registration
            if other in hooks:
                hooks.move_to_end(other)

    context.journal.record(f"forward hook of {type(module).__name__}", put_back)
    del hooks[key]
