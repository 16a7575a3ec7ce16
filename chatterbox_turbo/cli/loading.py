"""Getting a model for a command: real weights where they are or can be had, random ones where that will do."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from .screen import Screen

PROBE_SECONDS = 5
RANDOM = "random weights: the speech is noise, the work is that of the real architecture"


@dataclass(frozen=True)
class Wanted:
    """Which model a command asks for.

    ``fallback``: whether random weights will do where real ones cannot be had. ``default_stop``: ``stop_after``
    of random weights where the user names none.
    """

    family: str
    device: str = "cpu"
    size: str = "tiny"
    stop_after: int | None = None
    synthetic: bool = False
    checkpoint: Path | None = None
    fallback: bool = True
    default_stop: int | None = None


@dataclass(frozen=True)
class Loaded:
    """A model and where its weights come from: ``kind`` is real, checkpoint or synthetic."""

    model: Any
    kind: str
    description: str


def load_model(screen: Screen, wanted: Wanted) -> Loaded:
    """Load or build what is wanted, with upstream silenced.

    Raises:
        ModelUnavailableError: this upstream lacks the family, or the weights cannot be had.
        typer.BadParameter: options that contradict each other.
    """
    from ..errors import ModelUnavailableError
    from ..upstream import loading

    if wanted.synthetic and wanted.checkpoint:
        raise typer.BadParameter("give either --synthetic or --checkpoint.")
    if wanted.family == "vc" and wanted.stop_after is not None:
        raise typer.BadParameter("--stop-after is for models that sample speech tokens; vc does not.")
    with screen.step("importing chatterbox-tts"), screen.quiet():
        reason = why_unavailable(wanted.family)
    if reason:
        raise ModelUnavailableError(reason)
    if wanted.synthetic:
        return _build(screen, wanted, "asked for")
    if wanted.checkpoint:
        _note_unused(screen, wanted)
        return _load_folder(screen, wanted)
    cached, unreachable = loading.is_cached(wanted.family), why_unreachable(wanted.family)
    if not cached and unreachable:
        if wanted.fallback:
            return _build(screen, wanted, f"no weights are cached and {unreachable}")
        raise ModelUnavailableError(
            f"There are no weights for {wanted.family}: none are cached, and {unreachable}.",
            "",
            "Connect to the hub once, pass a folder with --checkpoint, or use random weights with --synthetic.",
        )
    _note_unused(screen, wanted)
    if cached:
        with screen.step("loading the weights"), screen.quiet(), _offline(bool(unreachable)):
            model = loading.load(wanted.family, wanted.device)
    else:
        screen.note("downloading the weights …")
        with screen.quiet(bars=True):
            model = loading.load(wanted.family, wanted.device)
    return Loaded(_with_voice(screen, model), "real", "real weights, from the Hugging Face cache")


def why_unavailable(family: str) -> str:
    """Why the installed chatterbox-tts has no such model, or an empty string. Imports it."""
    from ..errors import ModelUnavailableError
    from ..upstream.loading import model_class

    try:
        model_class(family)
    except ModelUnavailableError as error:
        return str(error)
    return ""


def why_unreachable(family: str) -> str:
    """Why the hub cannot be asked for this family's weights, or an empty string.

    Upstream's own attempt takes 40 s to fail, for the hub's client retries; one question with a short limit
    is enough to know.
    """
    import huggingface_hub

    from ..upstream.loading import key_file

    repo, file = key_file(family)
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, file), timeout=PROBE_SECONDS)
    except Exception as error:  # the client's errors have no base class that all its releases share
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"the hub does not offer {repo}/{file} ({type(error).__name__}: {cause})"
    return ""


def request_for(model: Any, text: str, language: str = "en", voice: Path | None = None) -> dict[str, Any]:
    """Keyword arguments of ``generate``. Voice conversion converts the bundled recording."""
    from .. import synthetic
    from ..measure.fidelity import arguments
    from ..upstream.families import identify

    parts = identify(model)
    request = arguments(parts, text, language, str(synthetic.reference_voice()))
    if voice is not None:
        request["target_voice_path" if parts.family == "vc" else "audio_prompt_path"] = str(voice)
    return request


def _build(screen: Screen, wanted: Wanted, why: str) -> Loaded:
    from .. import synthetic
    from ..errors import ModelUnavailableError

    stop = wanted.default_stop if wanted.stop_after is None else wanted.stop_after
    with screen.step(f"building a synthetic {wanted.family} model ({wanted.size})"), screen.quiet():
        try:
            model = synthetic.build(wanted.family, wanted.size, stop, device=wanted.device)
        except ValueError as error:
            raise ModelUnavailableError(str(error)) from error
    shape = "full-size" if wanted.size == "full" else "tiny (shrunk)"
    kind = RANDOM if wanted.size == "full" else "random weights, few layers: it shows that things work, not their speed"
    return Loaded(model, "synthetic", f"SYNTHETIC, {shape}, {kind}. Why: {why}.")


def _load_folder(screen: Screen, wanted: Wanted) -> Loaded:
    from contextlib import nullcontext

    from .. import synthetic
    from ..upstream import loading

    shrunk = synthetic.architecture("tiny") if wanted.size == "tiny" else nullcontext()
    with screen.step(f"loading {wanted.checkpoint}"), screen.quiet(), shrunk:
        model = loading.load(wanted.family, wanted.device, wanted.checkpoint)
    return Loaded(_with_voice(screen, model), "checkpoint", f"weights from {wanted.checkpoint}")


def _with_voice(screen: Screen, model: Any) -> Any:
    """The model with a reference voice; a checkpoint without ``conds.pt`` gets the bundled one."""
    from .. import synthetic
    from ..upstream.families import identify
    from ..upstream.warmup import prepare_voice

    parts = identify(model)
    if parts.voice is None:
        with screen.step("encoding the bundled reference voice"), screen.quiet():
            prepare_voice(parts, synthetic.reference_voice())
    return model


def _note_unused(screen: Screen, wanted: Wanted) -> None:
    if wanted.stop_after is not None:
        screen.note("--stop-after has no effect: these weights are not random (see decoding.max_new_tokens)")


@contextmanager
def _offline(wanted: bool):
    """Take cached files as they are: without a network each would cost the hub client's retries."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
