"""A Vocos checkpoint: a folder with the weights as safetensors and a description beside them; nothing is pickled.

The description says which mel frames the network was trained on, so that one of another kind is refused before its
weights are read, and what its own validation has measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import LONG, InvalidRequestError, ModelUnavailableError, brief
from ..loading.construction import construct, fill
from ..loading.digest import digest
from ..loading.mapped_files import MappedFiles
from ..loading.new_folder import check_destination, new_folder, remove_unfinished
from ..loading.tensor_file import TensorFile, form_of
from .vocos_network import MelDescription, VocosArchitecture, VocosNetwork

WEIGHTS, NAME = "vocoder.safetensors", "vocoder.json"
FORMAT, VERSION = "chatterbox-turbo vocoder checkpoint", 1
AGAIN = "Copy the folder again as a whole, or make the checkpoint again."
CONVERT = "This package reads safetensors beside a description, and no pickle."
_WINDOW = "head.istft.window"  # follows from the architecture
_FOREIGN = ("pytorch_model.bin", "config.yaml", "model.safetensors")  # of the package's own checkpoints, and others'
_LARGEST, _DEEPEST = 65536, 256  # of any number of an architecture, and of its layers

D = TypeVar("D", MelDescription, VocosArchitecture)


@dataclass(frozen=True)
class VocosCheckpoint:
    """What the description of a folder says.

    Attributes:
        architecture: the network's size.
        mel: what it is to be given.
        validation: figures of its own validation by name, as whoever trained it measured them; may be empty.
        training: how it was made, as plain values; may be empty.
        bytes, sha256: of the file of weights.
    """

    architecture: VocosArchitecture
    mel: MelDescription
    validation: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    sha256: str = ""

    def figures(self) -> str:
        """The validation figures on one line, for a report."""
        if not self.validation:
            return "the checkpoint carries no figures of a validation"
        return "by the checkpoint's own validation: " + ", ".join(f"{k} {v:.4g}" for k, v in self.validation.items())

    def to_dict(self) -> dict[str, Any]:
        """As the file has it."""
        content = asdict(self)
        facts = {name: content.pop(name) for name in ("bytes", "sha256")}
        return {"format": FORMAT, "version": VERSION, **content, "files": {WEIGHTS: facts}}


def write(
    folder: Path,
    network: VocosNetwork,
    validation: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
) -> VocosCheckpoint:
    """Write a network's folder; it appears as a whole or not at all. What killed processes left of it is deleted.

    Args:
        folder: does not exist yet, in one that does.
        validation: finite numbers by name.
        training: plain values, for JSON.

    Raises:
        InvalidRequestError: the folder exists or cannot be made, or figures are no finite numbers.
    """
    check_destination(folder)
    # a checkpoint is fp32, whatever the network is
    tensors = {name: value.detach().float() for name, value in network.state_dict().items() if name != _WINDOW}
    remove_unfinished(folder)
    with new_folder(folder, check_destination) as new:
        with TensorFile(new / WEIGHTS, {name: form_of(tensor) for name, tensor in tensors.items()}) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor)
        size, content = (new / WEIGHTS).stat().st_size, digest(new / WEIGHTS)
        made = VocosCheckpoint(
            network.architecture, network.mel, dict(validation or {}), dict(training or {}), size, content
        )
        try:
            text = json.dumps(made.to_dict(), indent=1, allow_nan=False) + "\n"
            _figures(made.validation)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"The figures of {folder.name} cannot be written: {error}.") from error
        (new / NAME).write_text(text, encoding="utf-8")
    return made


def read_description(folder: Path) -> VocosCheckpoint:
    """The description of a folder; of the weights nothing is read, not even that they are there.

    Raises:
        ModelUnavailableError: the folder has none, or it is damaged, of a newer version, of an unknown architecture.
    """
    path = folder / NAME
    if not path.is_file():
        raise _without_description(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnavailableError(f"Cannot read {path}: {error}.", "It is truncated or damaged.", AGAIN) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ModelUnavailableError(f"{path} does not describe a vocoder.", "Something else has written it.", AGAIN)
    version = content.pop("version", None)
    if isinstance(version, int) and version > VERSION:
        raise ModelUnavailableError(
            f"{brief(str(folder), LONG)} has format {version} of vocoder checkpoints.",
            f"This release of chatterbox_turbo reads format {VERSION}; a newer one has written it.",
            "Install a newer chatterbox_turbo.",
        )
    try:
        if version != VERSION:
            raise ValueError(f"its version is {brief(version)}")
        facts = content.pop("files")[WEIGHTS]
        checkpoint = VocosCheckpoint(
            architecture=_record(VocosArchitecture, content.pop("architecture")),
            mel=_record(MelDescription, content.pop("mel")),
            validation=_figures(content.pop("validation", {})),
            training=dict(content.pop("training", {})),
            bytes=int(facts["bytes"]),
            sha256=str(facts["sha256"]),
        )
        if content:
            raise ValueError(f"unknown: {', '.join(map(brief, content))}")
        _check_architecture(checkpoint)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelUnavailableError(f"{path} describes nothing that can be built: {cause}.", "", AGAIN) from error
    return checkpoint


def check_mel(checkpoint: VocosCheckpoint, mel: MelDescription, folder: Path) -> None:
    """Raise ``ModelUnavailableError`` with both descriptions side by side unless the checkpoint's mel is ``mel``."""
    if checkpoint.mel != mel:
        raise ModelUnavailableError(
            f"The vocoder in {brief(str(folder), LONG)} was trained on other mel frames than the model makes:\n"
            f"{mel.beside(checkpoint.mel, 'model', 'checkpoint')}\n",
            "It would turn speech into noise; nothing of its weights was read.",
            "Use a checkpoint that was trained on this model's mel frames (docs/vocoder.md).",
        )


def check_weights(checkpoint: VocosCheckpoint, folder: Path) -> None:
    """Raise ``ModelUnavailableError`` unless the file of weights is there, with as many bytes as the description says.

    Reads nothing of it.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelUnavailableError(
            f"{brief(str(folder), LONG)} lacks {WEIGHTS}.", f"{NAME} names it: it was not copied as a whole.", AGAIN
        )
    if (found := path.stat().st_size) != checkpoint.bytes:
        raise ModelUnavailableError(
            f"{path} has {found:,} bytes, and {NAME} says {checkpoint.bytes:,}.",
            "It is cut off or another file.",
            AGAIN,
        )


def load(folder: Path, device: torch.device | str = "cpu") -> VocosNetwork:
    """The network of a folder on a device, fp32, in evaluation mode, its parameters without gradients.

    Each weight is copied once, from the mapped file to the device. To train on, ``requires_grad_()`` and ``train()``.

    Raises:
        ModelUnavailableError: as ``read_description``; the weights are missing, cut off, damaged, no safetensors, or of
            another architecture than the description says; the package ``vocos`` cannot be imported.
    """
    checkpoint = read_description(folder)
    check_weights(checkpoint, folder)
    path = folder / WEIGHTS
    if digest(path) != checkpoint.sha256:
        raise ModelUnavailableError(f"{path} is damaged.", f"Its SHA-256 is not the one that {NAME} has for it.", AGAIN)
    network: nn.Module = construct(VocosNetwork, checkpoint.architecture, checkpoint.mel)
    files = MappedFiles()
    state = {**files.safetensors(path), _WINDOW: network.head.istft.window}
    fill(network, state, files, torch.device(device))
    return network.to(device).eval().requires_grad_(False)


def _without_description(folder: Path) -> ModelUnavailableError:
    if not folder.is_dir():
        return ModelUnavailableError(f"There is no folder {brief(str(folder), LONG)}.", "", "Name one with a vocoder.")
    found = next((name for name in _FOREIGN if (folder / name).exists()), "")
    return ModelUnavailableError(
        f"{brief(str(folder), LONG)} is no vocoder checkpoint of this package: it lacks {NAME}.",
        f"It has {found}, which is another tool's format. {CONVERT}" if found else "",
        f"Name a folder with {WEIGHTS} and {NAME} (docs/vocoder.md).",
    )


def _record(cls: type[D], values: Any) -> D:
    """A description from its JSON; ``ValueError`` or ``TypeError`` where it is none."""
    if not isinstance(values, dict):
        raise TypeError(f"{cls.__name__} is a {type(values).__name__}")
    kinds = {each.name: each.type for each in fields(cls)}
    if unknown := set(values) - set(kinds):
        raise ValueError(f"{cls.__name__} has an unknown {', '.join(sorted(map(brief, unknown)))}")
    checked = {}
    for name, value in values.items():
        kind = {"int": int, "float": (int, float), "bool": bool, "str": str}[kinds[name]]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is {brief(value)}, expected: {kinds[name]}")
        checked[name] = float(value) if kinds[name] == "float" else value
    return cls(**checked)


def _figures(values: Any) -> dict[str, float]:
    for name, value in dict(values).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"the figure {brief(name)} is {brief(value)}, no finite number")
    return dict(values)


def _check_architecture(checkpoint: VocosCheckpoint) -> None:
    """``ValueError`` where the network cannot be built, or would give other than ``hop`` samples a frame."""
    size, mel = checkpoint.architecture, checkpoint.mel
    numbers = {**{name: value for name, value in vars(size).items() if name != "padding"}, "bands": mel.bands}
    for name, value in numbers.items():
        most = _DEEPEST if name == "layers" else _LARGEST
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value:,}, expected: 1 to {most:,}")
    if size.padding != "same":
        raise ValueError(f'padding is {brief(size.padding)}, expected "same", which gives hop samples for each frame')
    if size.hop != mel.hop:
        raise ValueError(f"it makes {size.hop} samples of a mel frame, and one frame is {mel.hop} samples")
    if size.n_fft % 2 or (size.n_fft - size.hop) % 2 or size.n_fft < 2 * size.hop:
        raise ValueError(f"windows of {size.n_fft} samples do not overlap evenly at every {size.hop}")
