"""Upstream's classes by family, the checkpoint files that each reads, and loading them with clear errors."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import ModelUnavailableError
from .families import FAMILIES, TITLES

_CLASSES = {
    "english": ("chatterbox.tts", "ChatterboxTTS"),
    "multilingual": ("chatterbox.mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
    "nano": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
    "vc": ("chatterbox.vc", "ChatterboxVC"),
}
# One file that only this family needs: if it is cached, from_pretrained works offline.
_KEY_FILES = {
    "english": ("ResembleAI/chatterbox", "t3_cfg.safetensors"),
    "multilingual": ("ResembleAI/chatterbox", "t3_mtl23ls_v2.safetensors"),
    "turbo": ("ResembleAI/chatterbox-turbo", "t3_turbo_v1.safetensors"),
    "nano": ("ResembleAI/chatterbox-nano", "t3_nano_v1.safetensors"),
    "vc": ("ResembleAI/chatterbox", "s3gen.safetensors"),
}


def model_class(family: str) -> Any:
    """Upstream's class of a family.

    Raises:
        ModelUnavailableError: upstream is missing, broken, or too old to have this family.
    """
    if family not in _CLASSES:
        raise ModelUnavailableError(f"Unknown model {family!r}.", "", f"Models are: {', '.join(FAMILIES)}.")
    module, name = _CLASSES[family]
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelUnavailableError(
            f"Cannot import {name} from {module}: {error}.",
            f"{TITLES[family]} needs a release of chatterbox-tts that has it, with its dependencies.",
            "Run `chatterbox-turbo doctor`.",
        ) from error
    if family == "nano" and "nano" not in signature(cls.from_local).parameters:
        raise ModelUnavailableError(
            "The installed chatterbox-tts has no Nano model.", "", "Install a release that has it, or use turbo."
        )
    return cls


def key_file(family: str) -> tuple[str, str]:
    """Hub repository and name of a checkpoint file that stands for the family."""
    return _KEY_FILES[family]


def is_cached(family: str) -> bool:
    """Whether the checkpoint of a family is in the Hugging Face cache of this user."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(*key_file(family)), str)


def load(family: str, device: str, folder: Path | None = None) -> Any:
    """A model with real weights, by upstream's own ``from_local`` or ``from_pretrained``.

    Raises:
        ModelUnavailableError: the files are not there and cannot be had; the cause is in the message.
    """
    cls = model_class(family)
    extra = {"nano": True} if family == "nano" else {}
    try:
        if folder is not None:
            return cls.from_local(folder, device, **extra)
        return cls.from_pretrained(device, **extra)
    except Exception as error:
        if isinstance(error, TypeError) and "NoneType" in str(error):  # perth exports None without pkg_resources
            raise ModelUnavailableError(
                f"Cannot construct {TITLES[family]}: {error}.",
                "PerTh's watermarker is None because pkg_resources is missing (setuptools 81 dropped it).",
                "Run: pip install 'setuptools<81'",
            ) from error
        where = f"from {folder}" if folder else f"from the hub repository {_KEY_FILES[family][0]}"
        cause = (str(error).splitlines() or [""])[0]
        raise ModelUnavailableError(
            f"Cannot load {TITLES[family]} {where}: {type(error).__name__}: {cause}",
            "The weights are neither cached nor downloadable, or the folder lacks a file.",
            "Connect to the hub once, pass a checkpoint folder, or use a synthetic model (--synthetic).",
        ) from error
