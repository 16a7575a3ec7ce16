"""The token loop of T3 in place of upstream's, over upstream's backbone or over this package's own.

Replaces ``T3.inference`` (Llama) and ``T3.inference_turbo`` (GPT-2) of upstream's ``t3.py`` by ``token_model`` over
``runtime.t3.token_loop``. What the caller passes, and what it gets back, stays upstream's.
"""

from __future__ import annotations

from ..config import Fidelity, OptimizationConfig
from ..runtime import arguments
from ..upstream import t3 as upstream_t3
from ..upstream import t3_weights
from ..upstream.alignment import analysis_names
from ..upstream.patch_points import GPT2, LLAMA
from .base import Context, Pass
from .token_model import TokenModel


class DecodingPass(Pass):
    """One loop for all families; random numbers are drawn as upstream draws them."""

    name = "decoding"
    summary = "one token loop; fused weights, a static cache and the fastest step for this machine"
    families = (*LLAMA, *GPT2)
    patch_points = ("t3.inference", "t3.inference_turbo", "t3.prepare_input_embeds", "t3.tfmr.forward")
    replaces = ("t3.inference", "t3.inference_turbo")

    def fidelity(self, context: Context) -> Fidelity:
        return "numerical" if wants_static(context.config) else "exact"

    def check(self, context: Context) -> str:
        section, t3 = context.config.decoding, context.parts.t3
        capacity = upstream_t3.token_capacity(t3)
        if section.max_new_tokens is not None and section.max_new_tokens > capacity:
            return f"decoding.max_new_tokens is {section.max_new_tokens}, but the model has positions for {capacity}"
        reason = upstream_t3.why_not_own_sampling(t3)
        if not reason and section.backbone == "static":
            reason = t3_weights.why_not(t3, context.journal)
        return reason

    def apply(self, context: Context) -> str:
        t3 = context.parts.t3
        obstacle = t3_weights.why_not(t3, context.journal) if wants_static(context.config) else ""
        static = wants_static(context.config) and not obstacle
        around, attention = context.around.get("t3"), context.attention.get("prefill")
        section = context.config.decoding.model_copy(update={"streams": context.config.streams})
        model = TokenModel(t3, section, static, around, attention)
        if static:
            t3_weights.fuse(t3, context.journal)
            # before weights are restored, which it refers to; made again by the next use
            context.journal.record("cache of keys and values", model.release, redo=lambda: None)
            model.prepare()
        name = "inference" if upstream_t3.is_llama(t3) else "inference_turbo"
        context.journal.wrap(t3, name, lambda wrapped, instance, args, kwargs: model.calls(*args, **kwargs))
        context.engines.token_model = model
        if model.prepared is not None:
            context.prepared[self.name] = model.prepared
        context.remarks[self.name] = lambda: f"{model.remark()}: {obstacle}" if obstacle else model.remark()
        context.reproduced += [*upstream_t3.sampling_names(t3), *analysis_names(t3)]
        # before anything is done with them: upstream keeps ``exaggeration`` in the voice
        context.arguments.append(arguments.plain)
        return context.remarks[self.name]()


def wants_static(config: OptimizationConfig) -> bool:
    """Whether a step of this package's own is to compute, and not upstream's backbone."""
    backbone = config.decoding.backbone
    return backbone == "static" or (backbone == "auto" and config.fidelity != "exact")
