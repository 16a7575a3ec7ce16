"""Folders of a quantized checkpoint: the description beside the weights, and T3 and the voice made of it.

Upstream's own ``from_local`` runs over such a folder (``rebinding``), and is given other files for those that it asks
for. T3's file is its ``state_dict`` with ``QuantizedLinear`` layers in place; everything else is upstream's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LONG, ModelUnavailableError, brief
from ..runtime.device.quantized import SCHEMES
from ..runtime.loading.construction import misfit
from ..runtime.loading.digest import digest
from ..runtime.loading.mapped_files import MappedFiles
from ..runtime.quantization import backend_on, by_device
from . import t3_quantization
from .families import FAMILIES, TITLES

NAME = "chatterbox_turbo.json"
FORMAT, VERSION = "chatterbox-turbo quantized checkpoint", 1
AGAIN = "Copy the folder again as a whole, or make it again with `chatterbox-turbo quantize`."
_TENSOR = "tensor"  # what stands for one among the entries of a voice
_READERS = 4  # files that are digested at once
# ends of names that other tools' quantized weights have: bitsandbytes, GPTQ and AWQ, compressed-tensors and fp8
_FOREIGN = (
    ".absmax",
    ".quant_map",
    ".SCB",
    ".qweight",
    ".qzeros",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What the description of a folder says.

    Attributes:
        scheme, strategy, rounding: as in the configuration's section ``quantization``.
        t3: the file of T3's weights.
        stand_ins: by the name of a file that upstream asks for, the file here that has its tensors.
        unread: weights of T3 that upstream wants in its file and then deletes; they are not kept.
        voice: the file of the built-in voice, or ``None``.
        entries: by dotted name, what the voice is made of: a tensor of its file, or a number or ``null`` itself.
        options: of upstream's loader (``nano``, ``t3_model``), with which the original was read.
        files: bytes and SHA-256 of each file, by its name.
        written_by: versions of what wrote it.
    """

    family: str
    scheme: str
    strategy: str
    rounding: str
    t3: str
    stand_ins: Mapping[str, str]
    unread: tuple[str, ...] = ()
    voice: str | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    written_by: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the description into a folder."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        (folder / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def check_family(self, families: set[str], title: str, folder: Path) -> None:
        """Raise ``ModelUnavailableError`` unless it is one of these; where there are none, anything goes."""
        if families and self.family not in families:
            raise ModelUnavailableError(
                f"{brief(str(folder), LONG)} holds a quantized {TITLES[self.family]}, not {title}.",
                "",
                f'Load it as "{self.family}" (--model {self.family}), or quantize a checkpoint of the other model.',
            )

    def check_content(self, folder: Path) -> None:
        """Raise ``ModelUnavailableError`` unless every file is what was written, by its digest."""
        with ThreadPoolExecutor(min(torch.get_num_threads(), _READERS)) as readers:
            for name, found in zip(
                self.files, readers.map(digest, (folder / name for name in self.files)), strict=True
            ):
                if found != self.files[name]["sha256"]:
                    raise ModelUnavailableError(
                        f"{folder / name} is damaged.", f"Its SHA-256 is not the one that {NAME} has for it.", AGAIN
                    )

    def file_for(self, asked: Path) -> Path | None:
        """The safetensors file here that has the tensors of one that upstream asks for; ``None``: it is here itself.

        Raises:
            ModelUnavailableError: there is neither.
        """
        if asked.name in self.stand_ins:
            return asked.parent / self.stand_ins[asked.name]
        if not asked.exists():
            raise ModelUnavailableError(
                f"{brief(str(asked.parent), LONG)} was made of a checkpoint without {asked.name}.",
                f"It has {', '.join(self.stand_ins)}; upstream asks for other files by its release and its options.",
                "Quantize the checkpoint that this release loads with these options.",
            )
        return None

    def put_into(self, t3: nn.Module, state: Mapping[str, Tensor], path: Path, device: torch.device) -> dict[str, Any]:
        """Prepare a T3 without values for the state of its file; the state with which to fill it.

        Raises:
            ModelUnavailableError: it is another T3.
        """
        backend_on(self.scheme, device)  # chosen here, not in the first product
        layers = [name.removesuffix(".codes") for name in state if name.endswith(".codes")]
        try:
            t3_quantization.put_empty_layers(t3, layers, self.scheme, by_device)
            for name in self.unread:
                owner, _, attribute = name.rpartition(".")
                setattr(t3.get_submodule(owner), attribute, nn.Parameter(torch.empty(0, device="meta")))
        except (AttributeError, TypeError, ValueError) as error:
            raise misfit(t3, path, [str(error)]) from error
        return {**state, **{name: torch.empty(0) for name in self.unread}}

    def give_voice(self, model: Any, conditionals: Any, folder: Path, files: MappedFiles, device: str) -> None:
        """Give a model the built-in voice, by upstream's own class for it."""
        if self.voice is None:
            return
        tensors = files.safetensors(folder / self.voice)
        content: dict[str, dict[str, Any]] = {}
        for name, entry in self.entries.items():
            part, _, key = name.partition(".")
            content.setdefault(part, {})[key] = tensors[name].clone() if entry == _TENSOR else entry
        buffer = io.BytesIO()
        torch.save(content, buffer)
        buffer.seek(0)
        model.conds = conditionals.load(buffer, map_location=torch.device("cpu")).to(device)


def entries_of(voice: Mapping[str, Mapping[str, Any]], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and ``entries`` of a voice as upstream saves one.

    Raises:
        ModelUnavailableError: it holds something that neither safetensors nor JSON can.
    """
    flat = {f"{part}.{key}": value for part, inner in voice.items() for key, value in inner.items()}
    for name, value in flat.items():
        if not isinstance(value, Tensor | bool | int | float | None):
            raise ModelUnavailableError(
                f"Cannot keep {name} of {path} without pickle: it is a {type(value).__name__}.",
                "",
                "Make the voice again with the model's prepare_conditionals and conds.save, or remove the file.",
            )
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: _TENSOR if name in tensors else value for name, value in flat.items()}


def check_foreign(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ``ModelUnavailableError`` where the weights of a file are quantized by another tool."""
    if sign := next((name for name in tensors if name.endswith(_FOREIGN)), ""):
        raise ModelUnavailableError(
            f"{path} was quantized by another tool: it has {sign}.",
            "Upstream cannot read it either.",
            "Take the original checkpoint, and quantize it with `chatterbox-turbo quantize`.",
        )


def read(folder: Path) -> QuantizedCheckpoint | None:
    """The description of a folder, checked against its files' sizes; ``None`` where the folder is none of ours.

    Raises:
        ModelUnavailableError: the description or a file is missing, damaged or of a newer version.
    """
    path = folder / NAME
    if not path.exists():
        if lone := sorted(folder.glob("t3.*.safetensors")):
            raise ModelUnavailableError(
                f"{brief(str(folder), LONG)} lacks {NAME}.", f"{lone[0].name} is part of a quantized checkpoint.", AGAIN
            )
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(f"Cannot read {path}: {error}.", "It is truncated or damaged.", AGAIN) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ModelUnavailableError(
            f"{path} does not describe a quantized checkpoint.", "Something else has written it.", AGAIN
        )
    version = content.pop("version", None)
    if isinstance(version, int) and version > VERSION:
        raise ModelUnavailableError(
            f"{brief(str(folder), LONG)} has format {version} of quantized checkpoints.",
            f"This release of chatterbox_turbo reads format {VERSION}; a newer one has written it.",
            "Install a newer chatterbox_turbo, or quantize the original checkpoint with this one.",
        )
    try:
        checkpoint = QuantizedCheckpoint(**content)
        sound = version == VERSION and checkpoint.family in FAMILIES and checkpoint.scheme in SCHEMES
        names = {*checkpoint.stand_ins.values(), checkpoint.t3, *([checkpoint.voice] if checkpoint.voice else [])}
        sound = sound and names <= set(checkpoint.files) and all(Path(name).name == name for name in checkpoint.files)
        sizes = {name: int(facts["bytes"]) for name, facts in checkpoint.files.items() if facts["sha256"]}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ModelUnavailableError(f"{path} is damaged: {error}.", "", AGAIN) from error
    if not sound:
        raise ModelUnavailableError(f"{path} is damaged: it contradicts itself.", "", AGAIN)
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise ModelUnavailableError(
                f"{brief(str(folder), LONG)} lacks {name}.",
                f"{NAME} names it: the folder was not copied as a whole.",
                AGAIN,
            ) from None
        if found != size:
            raise ModelUnavailableError(
                f"{folder / name} has {found:,} bytes, and {NAME} says {size:,}.",
                "It is cut off or another file.",
                AGAIN,
            )
    return checkpoint
