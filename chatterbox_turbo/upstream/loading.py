"""Upstream's classes by family, the checkpoint files that each reads, and loading them with clear errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch

from ..errors import LONG, InvalidRequestError, ModelUnavailableError, TurboError, UnsupportedModelError, brief
from . import quantized_checkpoint
from .class_names import CLASSES, FOLDER
from .families import FAMILIES, TITLES, identify
from .rebinding import from_local, from_pretrained, once, original, spelled_out
from .survey import Surveyed
from .survey import survey as survey_of

# One file that only this family needs, of the newest release first: if it is cached, from_pretrained works offline.
_KEY_FILES = {
    "english": ("ResembleAI/chatterbox", ("t3_cfg.safetensors",)),
    "multilingual": ("ResembleAI/chatterbox", ("t3_mtl23ls_v2.safetensors", "t3_23lang.safetensors")),
    "turbo": ("ResembleAI/chatterbox-turbo", ("t3_turbo_v1.safetensors",)),
    "nano": ("ResembleAI/chatterbox-nano", ("t3_nano_v1.safetensors",)),
    "vc": ("ResembleAI/chatterbox", ("s3gen.safetensors",)),
}


def model_class(family: str) -> Any:
    """Upstream's class of a family.

    Raises:
        ModelUnavailableError: upstream is missing, broken, or too old to have this family.
    """
    if family not in CLASSES:
        raise ModelUnavailableError(f"Unknown model {brief(family)}.", "", f"Models are: {', '.join(FAMILIES)}.")
    module, name = CLASSES[family]
    try:
        cls = getattr(import_module(module), name)
    except Exception as error:  # torchaudio beside a torch that it was not built for raises RuntimeError
        raise ModelUnavailableError(
            f"Cannot import {name} from {module}: {error}.",
            f"{TITLES[family]} needs a release of chatterbox-tts that has it, with its dependencies.",
            "Run `chatterbox-turbo doctor`.",
        ) from error
    if family == "nano" and not _takes(cls.from_local, "nano"):
        raise ModelUnavailableError(
            "The installed chatterbox-tts has no Nano model.", "", "Install a release that has it, or use turbo."
        )
    return cls


def key_file(family: str) -> tuple[str, str]:
    """Hub repository and name of a checkpoint file that stands for the family."""
    repository, names = _key_files(family)
    return repository, names[0]


def _key_files(family: str) -> tuple[str, tuple[str, ...]]:
    """Hub repository and, of the files that releases have had, those that the installed one reads.

    All of them where it is missing, or its loader spells none out.
    """
    repository, names = _KEY_FILES[family]
    try:
        loader = original(model_class(family).from_local)
    except ModelUnavailableError:
        loader = None
    read = spelled_out(loader.__code__) if loader else []
    return repository, tuple(name for name in names if name in read) or names


def family_in(folder: Path, named: str | None = None) -> str:
    """The family of a checkpoint folder: what a quantized one says of itself, else the one named, else by its files.

    Raises:
        ModelUnavailableError: it holds no model that speaks, or several and none is named.
    """
    described = quantized_checkpoint.read(folder)
    speaking = {family: names for family, (_, names) in _KEY_FILES.items() if family != "vc"}
    there = [family for family, names in speaking.items() if any((folder / name).exists() for name in names)]
    found = [described.family] if described else [named] if named else there
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelUnavailableError(
            f"{folder} holds several models: {', '.join(found)}.", "", "Say which with --model."
        )
    raise ModelUnavailableError(
        f"{folder} is no checkpoint of a model that speaks.",
        f"It has none of {', '.join(name for names in sorted(speaking.values()) for name in names)}.",
        "Pass a folder that upstream's from_local reads, and --model where its files have other names.",
    )


def is_cached(family: str) -> bool:
    """Whether the checkpoint of a family is in the Hugging Face cache of this user."""
    from huggingface_hub import try_to_load_from_cache

    repository, names = _key_files(family)
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)


def load_own(family: str, device: str, folder: Path | None = None) -> Any:
    """A model by upstream's own loader as it is, for comparisons.

    Raises:
        ModelUnavailableError: upstream is missing, broken, or too old to have this family. Else what upstream raises.
    """
    cls, options = model_class(family), {"nano": True} if family == "nano" else {}
    with once(cls, "load_own"):  # a launcher's wrappers stay out of it
        if folder is None:
            return cls.from_pretrained(device, **options)
        return cls.from_local(folder, device, **options)


def load(
    source: Any, device: str | torch.device, folder: str | Path | None = None, *, mapped: bool = False, **options: Any
) -> Any:
    """An upstream model with the weights of a checkpoint, as upstream's own ``from_local`` makes it.

    Args:
        source: a family, or upstream's class (or a subclass).
        device: one that is there; the model keeps it as it is given.
        folder: the checkpoint; where ``None``, what ``from_pretrained`` downloads.
        mapped: leave weights that are on the CPU in the pages of their files.
        options: further arguments of upstream's loader (``nano``, ``t3_model``).

    Raises:
        UnsupportedModelError: ``source`` is neither.
        InvalidRequestError: upstream's loader takes no such option.
        ModelUnavailableError: the files are not there and cannot be had, or do not fit; the cause is in the message.
        ForeignPatchError: the class's loader is a wrapper that calls this function and hides upstream's own.
    """
    cls, title, options = _checked(source, folder, options)
    try:
        if folder is not None:
            return from_local(cls, Path(folder), device, mapped, **options)
        return from_pretrained(cls, device, mapped, **options)
    except (TurboError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unavailable(title, folder, error) from error


def survey(source: Any, folder: str | Path | None = None, **options: Any) -> tuple[Surveyed, str]:
    """A checkpoint and its family, without reading its weights (``survey.survey``). Arguments and errors as ``load``.

    Raises:
        ModelUnavailableError: also where it is quantized already, or has no T3.
    """
    cls, title, options = _checked(source, folder, options)

    def look(cls: Any, folder: Any, device: Any = None, **options: Any) -> Surveyed:
        if (found := quantized_checkpoint.read(Path(folder))) is not None:
            raise ModelUnavailableError(
                f"{brief(str(folder), LONG)} is quantized already ({found.scheme}).",
                "Rounding it once more would only add to the error.",
                "Start from the original checkpoint.",
            )
        return survey_of(cls, Path(folder), **options)

    if "vc" in families_of(cls, options):
        raise ModelUnavailableError(f"{title} has no T3, so that there is nothing to quantize.")
    try:
        found = look(cls, folder, **options) if folder else from_pretrained(cls, "cpu", load=look, **options)
        return found, identify(found.model).family
    except (TurboError, MemoryError):
        raise
    except Exception as error:
        raise _unavailable(title, folder, error) from error


def families_of(cls: Any, options: Mapping[str, Any]) -> set[str]:
    """The families that a class may load with these options; none where it is no class of upstream's."""
    names = {(base.__module__, base.__name__) for base in cls.__mro__}
    found = {family for family, name in CLASSES.items() if name in names}
    return found - {"turbo" if options.get("nano") else "nano"} if len(found) > 1 else found


def _checked(source: Any, folder: Any, options: dict[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    """Upstream's class, its title and the options of its loader, or an error as ``load`` raises it."""
    if isinstance(source, str):
        cls, title = model_class(source), TITLES[source]
        options = {"nano": True, **options} if source == "nano" else options
    else:
        cls, title = source, getattr(source, "__name__", "")
    loader = getattr(cls, "from_local" if folder is not None else "from_pretrained", None)
    if not isinstance(cls, type) or not callable(loader):
        raise UnsupportedModelError(
            f"{brief(cls)} cannot be loaded.",
            "It is neither one of upstream's classes nor a model's name.",
            f"Pass ChatterboxTTS or another of upstream's classes, or one of {', '.join(FAMILIES)}; optimize a model "
            "that is loaded already with apply(model).",
        )
    if folder is not None and not os.path.isdir(folder):
        raise ModelUnavailableError(
            f"There is no folder {brief(str(folder), LONG)}.", "", "Pass the folder of a checkpoint."
        )
    if folder is not None and (quantized := quantized_checkpoint.read(Path(folder))) is not None:
        quantized.check_family(families_of(cls, options), title, Path(folder))
        options = {**quantized.options, **options}
    unknown = [name for name in options if not _takes(loader, name)]
    if unknown:
        known = ", ".join(name for name in _parameters(loader) if name not in ("cls", FOLDER, "device"))
        raise InvalidRequestError(
            f"{title} takes no option {', '.join(unknown)}.", "", f"Options of its loader: {known or 'none'}."
        )
    return cls, title, options


def _parameters(loader: Any) -> Mapping[str, Parameter]:
    """What the loader takes that wrappers may stand around."""
    return signature(original(loader) or loader).parameters


def _takes(loader: Any, name: str) -> bool:
    found = _parameters(loader)
    return name in found or any(parameter.kind is Parameter.VAR_KEYWORD for parameter in found.values())


def _unavailable(title: str, folder: Any, error: Exception) -> ModelUnavailableError:
    if isinstance(error, TypeError) and "NoneType" in str(error):  # perth exports None without pkg_resources
        return ModelUnavailableError(
            f"Cannot construct {title}: {error}.",
            "PerTh's watermarker is None because pkg_resources is missing (setuptools 81 dropped it).",
            "Run: pip install 'setuptools<81'",
        )
    where = f"from {folder}" if folder is not None else "from the hub"
    cause = (str(error).splitlines() or [""])[0]
    return ModelUnavailableError(
        f"Cannot load {title} {where}: {type(error).__name__}: {cause}",
        "The weights are neither cached nor downloadable, or the folder lacks a file.",
        "Connect to the hub once, pass a checkpoint folder, or use a synthetic model (--synthetic).",
    )
