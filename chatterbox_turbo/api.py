"""The public verbs: load, quantize, apply, revert, optimized, inspect."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import __version__
from .budget.fitting import plan_within
from .config import Config, resolve
from .errors import BudgetError, InvalidRequestError, brief
from .handle import handle_of, put, revert
from .passes import ALL_PASSES, Pass
from .passes.memory import while_loading
from .passes.quantization import STRATEGIES
from .patching import Journal
from .plan import Plan
from .runtime.device.devices import device_named
from .runtime.device.quantized import SCHEMES
from .runtime.device.surroundings import plain
from .upstream import loading, quantized_writer
from .upstream.families import identify

Model = TypeVar("Model")


def load(
    source: type[Model] | str,
    device: Any = "auto",
    config: Config = None,
    *,
    folder: str | PathLike | None = None,
    optimize: bool = True,
    mapped: bool = False,
    passes: Sequence[Pass] = (),
    **options: Any,
) -> Model:
    """Load a model, faster and in half of the memory, and ``apply`` a configuration to it.

    The model is the one that upstream's ``from_pretrained`` or ``from_local`` would give: the same parameters, buffers
    and attributes, to the bit. Weights go from the mapped files straight to the device; the host needs memory for the
    weights once on a CPU, for a few tensors at a time on a GPU. Several threads may load at once.

    The initial values that upstream draws and overwrites are not drawn: PyTorch's global random generator is as it
    was, where upstream's loading advances it. What a constructor draws to keep (noise of the flow, up to chatterbox-tts
    0.1.5) comes from a generator of fixed seed.

    Where somebody has wrapped the class's ``from_pretrained`` or ``from_local``, what is below wrappers that have
    ``__wrapped__`` (functools.wraps, wrapt) runs: such a wrapper may call this function.

    Args:
        source: ``ChatterboxTTS`` or another of upstream's classes, or a name: english, multilingual, turbo, nano, vc.
        device: ``auto`` (the first CUDA device or the CPU), a name, or a ``torch.device``.
        config: as in ``apply``.
        folder: a checkpoint folder, as for ``from_local`` or as ``quantize`` writes it; ``None`` downloads what
            ``from_pretrained`` does, in parallel, into the same cache.
        optimize: ``False`` leaves out ``apply``.
        mapped: on a CPU, leave the weights in the pages of their files instead of copying them: that saves most of
            the time, and processes share one copy; but a file that is overwritten in place (not one that is deleted or
            replaced) changes or crashes the process. Their alignment is the file's, which may round differently.
        passes: as in ``apply``.
        options: further arguments of upstream's loader (``nano``, ``t3_model``).

    Raises:
        ModelUnavailableError: a file is missing, damaged or does not fit, or the hub cannot be reached.
        InvalidRequestError: there is no such device or option.
        UnsupportedModelError: ``source`` is neither a class of upstream's nor a name.
        ForeignPatchError: a wrapper without ``__wrapped__`` calls this function.
        TurboError: what ``apply`` raises; a wrong configuration is found before anything is loaded.

    Warns:
        SlowLoadingWarning: upstream's own loader had to do it.
    """
    resolved = resolve(config) if optimize else None
    name = device_named(device)
    given = device if isinstance(device, torch.device) else name  # upstream keeps it as ``model.device``
    if not optimize:
        return loading.load(source, given, folder, mapped=mapped, **options)
    with while_loading(resolved.memory, torch.device(name)):
        return apply(loading.load(source, given, folder, mapped=mapped, **options), resolved, passes=passes)


def quantize(
    source: Any,
    destination: str | PathLike,
    folder: str | PathLike | None = None,
    *,
    scheme: str = "int8",
    strategy: str = "balanced",
    rounding: str = "fitted",
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Path:
    """Write a checkpoint folder whose T3 is quantized: ``load`` reads it without ever holding the fp32 weights.

    The folder holds safetensors files, tokenizers, and a description (``chatterbox_turbo.json``); nothing in it is
    pickled. A model loaded from it is the one that ``apply`` with the same options in ``quantization`` makes, to the
    bit. Matrices are read, rounded and written one after the other. The folder appears as a whole or not at all.

    Args:
        source, folder, options: as in ``load``: what is quantized.
        destination: a folder that does not exist, in one that does.
        scheme, strategy, rounding: as in the configuration's section ``quantization``; ``auto`` is none of them.
        progress: called with what is written, the bytes of the source that are done, and those of all.

    Returns:
        The folder.

    Raises:
        InvalidRequestError: the destination exists or cannot be made; no such scheme, strategy or rounding; the layers
            do not fit the scheme.
        ModelUnavailableError: as in ``load``, and where the source is quantized already or has no T3.
        TurboError: there is too little room on the disk.
    """
    for name, value, known in (
        ("scheme", scheme, SCHEMES), ("strategy", strategy, STRATEGIES), ("rounding", rounding, ("nearest", "fitted"))
    ):  # fmt: skip
        if value not in known:
            raise InvalidRequestError(f"There is no {name} {brief(value)}.", "", f"There are: {', '.join(known)}.")
    target = Path(os.path.abspath(destination))
    quantized_writer.check_destination(target)
    surveyed, family = loading.survey(source, folder, **options)
    written_by = {"chatterbox-turbo": __version__, "torch": torch.__version__}
    choose = STRATEGIES[strategy].choose
    wanted = quantized_writer.Wanted(family, scheme, strategy, rounding, choose, options, written_by)
    with plain():
        quantized_writer.write(surveyed, target, wanted, progress or (lambda name, done, total: None))
    return target


def apply(model: Model, config: Config = None, *, passes: Sequence[Pass] = ()) -> Model:
    """Optimize a chatterbox model in place; a model that is optimized already gets the new configuration.

    Args:
        model: a ``ChatterboxTTS``, ``ChatterboxMultilingualTTS``, ``ChatterboxTurboTTS`` or ``ChatterboxVC``.
        config: ``None`` (the lossless set for this machine), a preset's name, a path to a TOML, YAML or JSON
            file, a dict, or an ``OptimizationConfig``.
        passes: passes from outside this package, applied after its own.

    Returns:
        The same object, with one attribute more: ``model.turbo``.

    Raises:
        UnsupportedModelError, InvalidConfigError, UnavailablePassError, PassConflictError, ForeignPatchError,
        BudgetError: before anything is touched. Whatever a pass raises while it is applied: after everything has been
            put back. Either way the model is as it was.

    Warns:
        ForeignPatchWarning, OriginalsDiscardedWarning: as ``revert`` does of the configuration before. The new one is
            applied by then, also where warnings are errors.
    """
    put(model, resolve(config), (*ALL_PASSES, *passes))
    return model


@contextmanager
def optimized(model: Model, config: Config = None, *, passes: Sequence[Pass] = ()) -> Iterator[Model]:
    """``apply`` for the body, then back to what the model was before, exceptions included."""
    old = handle_of(model)
    apply(model, config, passes=passes)
    try:
        yield model
    finally:
        if old:
            apply(model, old.plan.request, passes=old.plan.passes[len(ALL_PASSES) :])
        else:
            revert(model)


def inspect(model: Any, config: Config = None, *, passes: Sequence[Pass] = ()) -> Plan:
    """The plan that ``apply`` would carry out, without touching the model. Arguments and errors as there."""
    old = handle_of(model)
    journal = old.journal if old else Journal()  # tells own patches from foreign ones
    resolved = resolve(config)
    if old and resolved.budget is not None:
        raise BudgetError(
            "A budget cannot be planned for a model that is optimized already.",
            "Its weights are not what they were.",
            "Revert it first, or apply the configuration, which does.",
        )
    with plain():  # as apply does: what is measured here is kept
        return plan_within(identify(model), resolved, journal, (*ALL_PASSES, *passes))
