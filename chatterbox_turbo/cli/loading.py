"""Getting a model for a command: real weights where they are or can be had, random ones where that will do."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    from ..upstream import loading

    why = check(screen, wanted)
    if why:
        return _build(screen, wanted, why)
    _note_unused(screen, wanted)
    if wanted.checkpoint:
        return _load_folder(screen, wanted)
    if loading.is_cached(wanted.family):
        unreachable = why_unreachable(wanted.family)
        with screen.step("loading the weights"), screen.quiet(), offline(bool(unreachable)):
            model = loading.load(wanted.family, wanted.device)
    else:
        screen.note("downloading the weights …")
        with screen.quiet(bars=True):
            model = loading.load(wanted.family, wanted.device)
    return Loaded(_with_voice(screen, model), "real", "real weights, from the Hugging Face cache")


def check(screen: Screen, wanted: Wanted) -> str:
    """Why the model has to have random weights, or an empty string.

    Raises: as ``load_model``.
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
        return "asked for"
    if wanted.checkpoint or loading.is_cached(wanted.family):
        return ""
    unreachable = why_unreachable(wanted.family)
    if unreachable and not wanted.fallback:
        raise ModelUnavailableError(
            f"There are no weights for {wanted.family}: none are cached, and {unreachable}.",
            "",
            "Connect to the hub once, pass a folder with --checkpoint, or use random weights with --synthetic.",
        )
    return f"no weights are cached and {unreachable}" if unreachable else ""


@dataclass(frozen=True)
class Source:
    """Where processes of their own get a model from, pickled on its way to them: a folder, or the hub's cache.

    ``size``: the architecture of a shrunk or synthetic model, or an empty string. ``offline``: take cached files as
    they are.
    """

    family: str
    device: str
    folder: Path | None = None
    size: str = ""
    offline: bool = False

    def imports(self) -> None:
        """Import what a model is made of."""
        from ..upstream.loading import model_class

        model_class(self.family)

    def load(self, own: bool = False) -> Any:
        """The model, with a voice; ``own``: by upstream's own loader."""
        from .. import synthetic
        from ..upstream import loading
        from ..upstream.families import identify
        from ..upstream.warmup import prepare_voice

        with synthetic.architecture(self.size) if self.size else nullcontext(), offline(self.offline):
            if own:
                model = loading.load_own(self.family, self.device, self.folder)
            else:
                model = loading.load(self.family, self.device, self.folder)
        parts = identify(model)
        if parts.voice is None:
            prepare_voice(parts, synthetic.reference_voice())
        return model


@contextmanager
def source_of(screen: Screen, wanted: Wanted) -> Iterator[tuple[Source, str]]:
    """What ``load_model`` would load, for processes of their own, and its description.

    Random weights are written to a temporary folder first. Errors as of ``load_model``.
    """
    from ..upstream import loading

    why = check(screen, wanted)
    if not why:
        _note_unused(screen, wanted)
        if wanted.checkpoint:
            size = wanted.size if wanted.size == "tiny" else ""
            yield Source(wanted.family, wanted.device, wanted.checkpoint, size), f"weights from {wanted.checkpoint}"
            return
        if not loading.is_cached(wanted.family):
            load_model(screen, wanted)  # downloads
        cached = bool(why_unreachable(wanted.family))
        yield Source(wanted.family, wanted.device, offline=cached), "real weights, from the Hugging Face cache"
        return
    with tempfile.TemporaryDirectory(prefix="chatterbox-turbo-") as folder:
        with screen.step(f"writing a synthetic {wanted.family} checkpoint ({wanted.size})"), screen.quiet():
            _save(Path(folder), wanted)
        yield Source(wanted.family, wanted.device, Path(folder), wanted.size), _description(wanted, why)


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
    return Loaded(model, "synthetic", _description(wanted, why))


def _description(wanted: Wanted, why: str) -> str:
    shape = "full-size" if wanted.size == "full" else "tiny (shrunk)"
    kind = RANDOM if wanted.size == "full" else "random weights, few layers: it shows that things work, not their speed"
    return f"SYNTHETIC, {shape}, {kind}. Why: {why}."


def _save(folder: Path, wanted: Wanted) -> None:
    """A checkpoint of random weights, by a process whose memory is gone afterwards."""
    from .. import synthetic
    from ..errors import ModelUnavailableError

    stop = wanted.default_stop if wanted.stop_after is None else wanted.stop_after
    saving = multiprocessing.get_context("spawn").Process(
        target=synthetic.save, args=(folder, wanted.family, wanted.size, stop), daemon=True
    )
    saving.start()
    try:
        saving.join()
    finally:
        saving.terminate()
        saving.join()  # it writes into a folder that is removed next
    if saving.exitcode:
        raise ModelUnavailableError(
            f"The synthetic {wanted.family} checkpoint could not be written to {folder}.",
            f"Its process ended with code {saving.exitcode}.",
            "A full-size one needs 3.2 GB there: set TMPDIR to a folder that has them.",
        )


def _load_folder(screen: Screen, wanted: Wanted) -> Loaded:
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
def offline(wanted: bool):
    """Take cached files as they are: without a network each would cost the hub client's retries."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
