"""Modules of S3Gen as the runtime's records of weights, and the check of an architecture that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..patching import Journal
from ..runtime.layers import Linear, Norm
from ..runtime.s3gen.frames import Conv
from .structure import why_not_plain


def as_conv(module: nn.Module) -> Conv:
    """A view of the weight, and the bias in its format."""
    return Conv(module.weight.data, bias_of(module))


def as_linear(module: nn.Module) -> Linear:
    """A view of the weight, and the bias in its format."""
    return Linear(module.weight.data, bias_of(module))


def as_norm(module: nn.Module) -> Norm:
    """In fp32."""
    return Norm(module.weight.data.float(), module.bias.data.float(), module.eps)


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias in the weight's format."""
    return None if module.bias is None else module.bias.data.to(module.weight.dtype)


def refuse_unless(facts: Mapping[str, tuple[Any, Any]], part: str, reader: str, section: str) -> None:
    """Compare what is found with what is wanted, by name.

    Args:
        part: of S3Gen; ``reader``: what computes the wanted only; ``section``: of the config, which turns it off.

    Raises:
        UnsupportedModelError: the first that differs.
    """
    for name, (found, wanted) in facts.items():
        if found != wanted:
            raise UnsupportedModelError(
                f"S3Gen's {part} has {name} = {found!r}.",
                f"{reader} computes {wanted!r} only.",
                f"Set {section}.enabled = false.",
            )


def unsuitable(
    check: Callable[[], None],
    root: Callable[[], nn.Module],
    path: str,
    journal: Journal,
    parametrizations: bool = False,
) -> str:
    """Why the runtime cannot compute what the network at ``path`` does from its weights; empty where it can.

    Args:
        check: raises ``UnsupportedModelError`` for another architecture.
        root: the network.
        journal, parametrizations: as for ``why_not_plain``.
    """
    try:
        reason = why_not_plain(root(), path, journal, parametrizations)
        if not reason:
            check()
    except (UnsupportedModelError, AttributeError) as error:
        return str(error)
    return reason
