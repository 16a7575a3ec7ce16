"""Texts of any length: what is too long to be said at once is said in pieces."""

from __future__ import annotations

from ..upstream import stages
from ..upstream.patch_points import SPEAKING
from .base import Context, Pass


class TextPass(Pass):
    """Has ``generate``, batches and streams cut long texts (``speech.long_text``), and speak numbers as words."""

    name = "text"
    summary = "texts of any length in pieces; numbers as words"
    families = SPEAKING

    def idle(self, context: Context) -> str:
        if context.config.text.enabled != "auto" or context.config.fidelity != "exact":
            return ""
        return 'fidelity = "exact": what upstream cuts is cut'

    def check(self, context: Context) -> str:
        return stages.why_not(context.parts, context.journal)

    def apply(self, context: Context) -> str:
        section = context.config.text
        context.engines.text = section
        remark = f"pieces of about {section.lengths[0]:g} s where a text is too long to be said at once"
        return f"{remark}; numbers as words" if section.normalize else remark
