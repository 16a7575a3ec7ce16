"""Weights as small integers: T3's matrices by scheme, strategy and back end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config import Fidelity
from ..runtime.device.quantized import SCHEMES, QuantizedLinear
from ..runtime.quantization import backend_for, scheme_for
from ..upstream import t3_quantization, t3_weights
from ..upstream.patch_points import GPT2, LLAMA
from .base import Context, Pass


@dataclass(frozen=True)
class Strategy:
    """What is quantized: blocks but for so many ``ends`` on either side, and of each these ``kinds`` of products.

    Embeddings, the head, norms, biases and what encodes the voice (perceiver included) stay in every strategy.
    """

    ends: int
    kinds: tuple[str, ...]

    def choose(self, t3: nn.Module) -> list[list[t3_weights.Site]]:
        """The layers of each product that is quantized."""
        every = list(t3_weights.products(t3))
        last = max(index for index, _, _ in every) - self.ends
        return [sites for index, kind, sites in every if self.ends <= index <= last and kind in self.kinds]


STRATEGIES = {
    "conservative": Strategy(2, ("qkv", "out", "up")),
    "balanced": Strategy(1, t3_weights.KINDS),
    "aggressive": Strategy(0, t3_weights.KINDS),
}


class QuantizationPass(Pass):
    """Puts ``QuantizedLinear`` layers in T3's place; upstream's code and the static backbone both compute with them."""

    name = "quantization"
    summary = "T3's matrices as int8 or four bits a weight, by kernels of this package, bitsandbytes or torch"
    families = (*LLAMA, *GPT2)

    def idle(self, context: Context) -> str:
        reason, found = super().idle(context), _found(context)
        if not reason or not found:
            return reason
        return (
            f"{reason}; T3 was {', '.join(found)} before: every promise, exact included, is against these weights, and "
            "reverting leaves them"
        )

    def fidelity(self, context: Context) -> Fidelity:
        return "lossy" if _found(context) else super().fidelity(context)

    def check(self, context: Context) -> str:
        section, t3, device = context.config.quantization, context.parts.t3, context.parts.device
        scheme = self.scheme(context)
        return (
            t3_weights.why_not(t3, context.journal)
            or backend_for(scheme, section.backend, device)[1]
            or t3_quantization.why_not(t3, scheme, self.chosen(context), context.journal)
        )

    def apply(self, context: Context) -> str:
        section, t3, device = context.config.quantization, context.parts.t3, context.parts.device
        scheme = self.scheme(context)
        backend, _ = backend_for(scheme, section.backend, device)
        chosen = self.chosen(context)
        replaced = t3_quantization.replace_layers(
            t3, chosen, SCHEMES[scheme], backend, section.rounding == "fitted", context.journal
        )
        context.holdings["original layers"] = replaced
        if section.originals == "discard":
            context.journal.give_up(f"T3 ({scheme})", t3, replaced.forget)
        every = [getattr(*sites[0]) for _, _, sites in t3_weights.products(t3)]
        now = sum(isinstance(layer, QuantizedLinear) for layer in every)
        more = f", {now} are" if now > len(chosen) else ""
        done = f"T3 in {scheme} ({section.strategy}: {len(chosen)} of {len(every)} products{more}), "
        if replaced.before:
            done += f"{replaced.before / 2**20:.0f} MiB as {replaced.after / 2**20:.0f}, "
        context.remarks[self.name] = lambda: done + f"{backend}; {_whereabouts(replaced)}"
        return context.remarks[self.name]()

    def scheme(self, context: Context) -> str:
        """``auto`` is what T3 has already, where it was loaded so."""
        asked, found = context.config.quantization.t3, _found(context)
        return found[0] if asked == "auto" and found else scheme_for(asked, context.parts.device)

    def chosen(self, context: Context) -> list[list[t3_weights.Site]]:
        """The layers of each product that is quantized."""
        return STRATEGIES[context.config.quantization.strategy].choose(context.parts.t3)


def _found(context: Context) -> list[str]:
    """Schemes that T3 has without this configuration: of a quantized checkpoint, or of one that let originals go."""
    return t3_quantization.schemes(context.parts.t3, context.journal)


def _whereabouts(replaced: t3_quantization.Replaced) -> str:
    if not replaced.before:
        return "they were that before, and reverting leaves them so"
    if replaced.nbytes:
        return f"original layers kept on the host ({replaced.nbytes / 2**20:.0f} MiB)"
    return "original layers given up: T3 stays quantized when this is reverted"
