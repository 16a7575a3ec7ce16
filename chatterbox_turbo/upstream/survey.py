"""A checkpoint as upstream's own ``from_local`` takes it, without reading its weights: which file has what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelUnavailableError
from ..runtime.loading.construction import UnfamiliarConstructionError, assign
from ..runtime.loading.mapped_files import MappedFiles
from .rebinding import Loading, once


@dataclass
class Surveyed:
    """A checkpoint of which nothing but its small parts has been read.

    Attributes:
        model: upstream's, whose parameters are the very tensors of the mapped files, in the files' formats.
        tensors: of each file of weights that upstream has read, by its name.
        t3: the file that T3 was filled from.
    """

    model: Any
    folder: Path
    files: MappedFiles
    tensors: dict[str, dict[str, torch.Tensor]]
    t3: str


def survey(cls: Any, folder: Path, **options: Any) -> Surveyed:
    """Run ``cls.from_local(folder, "cpu", **options)`` over a checkpoint without reading its weights.

    Raises:
        ModelUnavailableError: upstream's code does something that is not known here, or as in ``from_local``.
    """
    cls = vars(cls).get("stands_for", cls)
    with once(cls, "from_local"):
        loading = _Survey("cpu", mapped=True)
        try:
            model = loading.run(cls, folder, options)
            problem = loading.problem()
        except UnfamiliarConstructionError as error:
            model, problem = None, str(error)
    t3 = loading.files_of.get(id(getattr(model, "t3", None)))
    if problem or t3 is None:
        why = problem or "its T3 does not come from a safetensors file"
        raise ModelUnavailableError(f"The checkpoint in {folder} cannot be read tensor by tensor: {why}.")
    return Surveyed(model, folder, loading.files, loading.tensors, t3.name)


class _Survey(Loading):
    """One call of ``from_local`` whose modules are given the tensors of the files as they are."""

    def __init__(self, device: str, mapped: bool):
        super().__init__(device, mapped)
        self.files_of: dict[int, Path] = {}  # by the module's id

    def _fill(self, module: nn.Module, state: Any, strict: bool) -> Any:
        if (path := self.files.path_of(state)) is not None:
            self.files_of[id(module)] = path
        return assign(module, state, self.files, strict)
