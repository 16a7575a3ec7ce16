"""A checkpoint folder with T3 quantized, written matrix by matrix from the mapped files of another one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LONG, InvalidRequestError, ModelUnavailableError, TurboError, brief
from ..patching import Journal
from ..runtime.device.rounding import forms, quantize
from ..runtime.loading.digest import digest
from ..runtime.loading.new_folder import check_destination, new_folder, remove_unfinished
from ..runtime.loading.tensor_file import Form, TensorFile, form_bytes, form_of
from . import t3_quantization, t3_weights
from .quantized_checkpoint import NAME, QuantizedCheckpoint, entries_of
from .survey import Surveyed
from .t3_quantization import weight_of

Progress = Callable[[str, int, int], None]  # what is written, bytes of the source so far, and in all
_VOICE = "conds.pt"
_OTHERS = re.compile(r"[^.].*\.(json|txt|model|jinja)|(LICENSE|NOTICE|README).*")  # tokenizers' files, terms
_PARTS = ("codes", "scales", "zeros")


@dataclass(frozen=True)
class Wanted:
    """Which quantization: as in the configuration's section of that name, ``choose`` for the strategy.

    Attributes:
        choose: the layers of T3 that are quantized, by product.
        options: of upstream's loader, for the description.
        written_by: versions, for the description.
    """

    family: str
    scheme: str
    strategy: str
    rounding: str
    choose: Callable[[nn.Module], Sequence[Sequence[t3_weights.Site]]]
    options: dict[str, Any]
    written_by: dict[str, str]


def write(source: Surveyed, destination: Path, wanted: Wanted, progress: Progress) -> QuantizedCheckpoint:
    """Write the folder; it appears as a whole or not at all. What killed processes left of it before is deleted.

    Raises:
        InvalidRequestError: the destination exists, or the layers do not fit the scheme.
        ModelUnavailableError: the source holds what cannot be written without pickle.
        TurboError: there is too little room on the disk.
    """
    check_destination(destination)
    writer = _Writer(source, wanted, progress)
    remove_unfinished(destination)
    writer.check_room(destination.parent)
    with new_folder(destination, check_destination) as folder:
        return writer.write(folder)


class _Writer:
    """What is to be written of a source, found out before anything is."""

    def __init__(self, source: Surveyed, wanted: Wanted, progress: Progress):
        self._source, self._wanted, self._progress = source, wanted, progress
        t3 = source.model.t3
        chosen = wanted.choose(t3)
        reason = t3_weights.why_not(t3, Journal()) or t3_quantization.why_not(t3, wanted.scheme, chosen, Journal())
        if reason:
            raise InvalidRequestError(
                f"The T3 in {source.folder} cannot be quantized as {wanted.scheme} ({wanted.strategy}).",
                f"{reason[0].upper()}{reason[1:]}.",
                "Choose another scheme or strategy.",
            )
        self._layers = t3_quantization.names(t3, chosen)
        state, kept = source.tensors[source.t3], t3.state_dict()
        self._unread = tuple(name for name in state if name not in kept)
        quantized = {f"{layer}.weight" for layer in self._layers}
        self._stay = [name for name in state if name in kept and name not in quantized]
        self._t3_file = f"t3.{wanted.scheme}.safetensors"
        self._pickled = [name for name in source.tensors if Path(name).suffix != ".safetensors"]
        as_they_are = [name for name in source.tensors if name not in (source.t3, *self._pickled)]
        self._copied = [*as_they_are, *(p.name for p in sorted(source.folder.iterdir()) if _is_other(p))]
        voice = source.folder / _VOICE
        self._voice, self._entries = _read_voice(voice) if voice.exists() else ({}, {})
        self._forms = {self._t3_file: self._t3_forms(), **{_renamed(n): self._plain(n) for n in self._pickled}}
        self._done, self._all = 0, sum(t.nbytes for ts in source.tensors.values() for t in ts.values())

    def check_room(self, parent: Path) -> None:
        """Raise ``TurboError`` where the disk has too little."""
        needed = sum((self._source.folder / name).stat().st_size for name in self._copied)
        needed += sum(form_bytes(form) for forms in self._forms.values() for form in forms.values()) + 2**20
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise TurboError(
                f"{brief(str(parent), LONG)} has {free / 2**20:,.0f} MiB free, and {needed / 2**20:,.0f} are needed.",
                "",
                "Free some, or name a folder on another disk.",
            )

    def write(self, folder: Path) -> QuantizedCheckpoint:
        """Everything, the description last."""
        self._write_t3(folder / self._t3_file)
        stand_ins = {self._source.t3: self._t3_file}
        for name in self._pickled:
            stand_ins[name] = _renamed(name)
            self._write_plain(name, folder / _renamed(name))
        if self._voice:
            voice = {name: tensor.contiguous() for name, tensor in self._voice.items()}
            with TensorFile(folder / _renamed(_VOICE), {name: form_of(t) for name, t in voice.items()}) as file:
                for name, tensor in voice.items():
                    file.write(name, tensor)
        for name in self._copied:
            shutil.copyfile(self._source.folder / name, folder / name)
            self._advance(name, sum(t.nbytes for t in self._source.tensors.get(name, {}).values()))
        wanted = self._wanted
        described = QuantizedCheckpoint(
            family=wanted.family,
            scheme=wanted.scheme,
            strategy=wanted.strategy,
            rounding=wanted.rounding,
            t3=self._t3_file,
            stand_ins=stand_ins,
            unread=self._unread,
            voice=_renamed(_VOICE) if self._voice else None,
            entries=self._entries,
            options=wanted.options,
            written_by=wanted.written_by,
        )
        files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir())}
        described = replace(described, files=files)
        described.write(folder)
        return described

    def _t3_forms(self) -> dict[str, Form]:
        state, t3 = self._source.tensors[self._source.t3], self._source.model.t3
        found = {name: form_of(state[name]) for name in self._stay}
        for layer in self._layers:
            rows, columns = weight_of(t3.get_submodule(layer)).shape
            for part, (dtype, each) in zip(_PARTS, forms(self._wanted.scheme, columns), strict=False):
                found[f"{layer}.{part}"] = dtype, (rows, each)
        return found

    def _plain(self, name: str) -> dict[str, Form]:
        return {key: form_of(tensor) for key, tensor in self._source.tensors[name].items()}

    def _write_t3(self, path: Path) -> None:
        source = self._source
        state = source.tensors[source.t3]
        with TensorFile(path, self._forms[path.name]) as file:
            for name in self._stay:
                file.write(name, state[name])
                self._leave(path.name, state[name])
            for layer in self._layers:
                weight = weight_of(source.model.t3.get_submodule(layer))
                matrix = quantize(weight, self._wanted.scheme, self._wanted.rounding == "fitted")
                for part, tensor in zip(_PARTS, matrix.tensors, strict=False):
                    file.write(f"{layer}.{part}", tensor)
                self._leave(path.name, state[f"{layer}.weight"])
        self._advance(path.name, sum(state[name].nbytes for name in self._unread))

    def _write_plain(self, name: str, path: Path) -> None:
        with TensorFile(path, self._forms[path.name]) as file:
            for key, tensor in self._source.tensors[name].items():
                file.write(key, tensor)
                self._leave(path.name, tensor)

    def _leave(self, name: str, tensor: Tensor) -> None:
        self._source.files.release(tensor)
        self._advance(name, tensor.nbytes)

    def _advance(self, name: str, size: int) -> None:
        self._done += size
        self._progress(name, self._done, self._all)


def _is_other(path: Path) -> bool:
    return path.is_file() and path.name != NAME and _OTHERS.fullmatch(path.name) is not None


def _renamed(name: str) -> str:
    return f"{Path(name).stem}.safetensors"


def _read_voice(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return entries_of(content, path)
    except TurboError:
        raise
    except Exception as error:  # pickle, zip and the system each have their own
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelUnavailableError(f"Cannot read {path}: {cause}", "", "Download it again.") from error
