"""``prepare``: what the first use of an installation would wait for, for image builds and first starts."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Annotated, Any

import typer

from . import options
from .loading import Wanted, load_model, request_for
from .options import ModelName, SizeName
from .screen import Screen

TEXT = "Hello."


def prepare(
    context: typer.Context,
    model: options.Model = ModelName.english,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    device: options.Device = "auto",
    checkpoint: options.Checkpoint = None,
    size: options.Size = SizeName.full,
    download: Annotated[bool, typer.Option("--download", help="Fetch the model's weights as well.")] = False,
) -> None:
    """Do beforehand what the first use would wait for.

    Compiles the kernels and measures which step is fastest, and keeps both on disk, so that the first start in an image
    or on a machine is as quick as the later ones. Needs no weights: a model of the real widths with few layers and
    random weights does, or the one in --checkpoint. Run it once for each model and preset that is used, with as many
    threads as later.
    """
    screen = options.screen_of(context)
    if checkpoint and download:
        raise typer.BadParameter("give either --checkpoint or --download.")
    with screen.step("importing torch"), screen.quiet():
        import torch
    settings = options.configuration(screen, preset, config)
    if settings.budget is not None and not (checkpoint or download):
        raise typer.BadParameter(
            "a budget is planned by the sizes of a model, and the one of few layers fits into any: "
            "give --checkpoint or --download, or a configuration without it that has the options it leads to."
        )
    wanted = Wanted(model.value, options.device_named(device), size.value, checkpoint=checkpoint, fallback=False)
    on_cpu = wanted.device.startswith("cpu")
    if on_cpu:
        _check_folders()
    if checkpoint or download:
        found = load_model(screen, wanted)
        screen.print(f"weights: {found.description}")
        loaded = found.model
    else:
        loaded = _few_layers(screen, wanted)
    start = time.perf_counter()
    with screen.step("compiling kernels and measuring the step"), screen.quiet():
        done = _use(loaded, settings)
    threads = f", {torch.get_num_threads()} threads" if on_cpu else ""
    name = f"preset {settings.preset}" if settings.preset else "the configuration"
    screen.print(
        f"prepared {model.value} with {name} on {wanted.device}{threads} in {time.perf_counter() - start:.1f} s"
    )
    for line in done:
        screen.print(line)
    if on_cpu:
        screen.print("use it with the same folders (NUMBA_CACHE_DIR, CHATTERBOX_TURBO_CACHE) and as many threads")
    else:
        screen.print("CUDA graphs and what torch.compile makes belong to a process: see warmup in the configuration")


def _check_folders() -> None:
    """Raise where nothing could be kept: it is all that this is for."""
    from ..errors import TurboError
    from ..runtime.cpu import measurements
    from ..runtime.cpu.threads import why_no_kernels

    if why_no_kernels():
        raise TurboError(f"There are no kernels to compile: {why_no_kernels()}.")
    from ..runtime.cpu import attention, instructions, products, quantized_linear, step_kernels  # noqa: F401

    asked, folders = os.environ.get("NUMBA_CACHE_DIR"), instructions.kernel_folders()
    if folders is None or (asked and not all(os.path.abspath(f).startswith(os.path.abspath(asked)) for f in folders)):
        raise TurboError(
            f"Compiled kernels cannot be kept{f' in {asked}' if asked else ''}.",
            "The folder that NUMBA_CACHE_DIR names cannot be written."
            if asked
            else "Neither the package's folder nor the user's cache folder can be written.",
            "Set NUMBA_CACHE_DIR to a folder that can, here and where the model is used.",
        )
    folder = measurements.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TurboError(
            f"The measurement cannot be kept: {folder} cannot be written ({error.strerror or error}).",
            "",
            f"Set {measurements.CACHE_VARIABLE} to a folder that can, here and where the model is used.",
        ) from None


def _few_layers(screen: Screen, wanted: Wanted) -> Any:
    """A model whose kernels and step are those of the real one."""
    from .. import synthetic
    from ..errors import ModelUnavailableError

    size = synthetic.SHALLOW if wanted.size == "full" else wanted.size
    with screen.step("building a model of few layers"), screen.quiet():
        try:
            return synthetic.build(wanted.family, size, device=wanted.device)
        except ValueError as error:
            raise ModelUnavailableError(str(error)) from error


def _use(model: Any, settings: Any) -> list[str]:
    """Apply and speak once; what that has made, as lines."""
    from .. import api, synthetic
    from ..runtime.t3 import step_choice

    before = step_choice.measured().keys()
    api.apply(model, settings)
    model.generate(**request_for(model, TEXT, voice=synthetic.reference_voice()))
    lines, decoding = _kernels(), model.turbo.plan.step("decoding")
    if decoding.status == "on":
        new = step_choice.measured().keys() - before
        lines.append(f"step: {decoding.reason}")
        lines.append(f"measured: {f'now, kept in {step_choice.steps_file()}' if new else 'nothing that was not known'}")
    return lines


def _kernels() -> list[str]:
    instructions = sys.modules.get("chatterbox_turbo.runtime.cpu.instructions")
    if instructions is None:
        return ["kernels: none on this device"]
    compiled, found = instructions.compilations()
    folders = ", ".join(sorted(instructions.kernel_folders() or ()))
    return [f"kernels: {compiled} compiled, {found} found, kept in {folders}"]
