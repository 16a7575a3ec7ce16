"""Checkpoint files mapped into memory: each tensor is read once, and the file's pages do not stay resident."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ModelUnavailableError
from ..cpu.host_memory import release_mapped

_ZIP = b"PK\x03\x04"  # what torch.save writes since 1.6; older files cannot be mapped


class MappedFiles:
    """The files of one checkpoint while it is loaded. One thread opens them; ``place`` is for several.

    Tensors that it hands out are views of private mappings: writing to one alters no file. They stay valid for as long
    as they live, but a file that is overwritten in place changes or crashes the process that maps it, so whatever is to
    stay takes a copy (``place``), unless ``keep`` says that the files will not change.
    """

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        # holds every mapping until the end: an address then never comes to mean other memory
        self._tensors: dict[int, tuple[Tensor, int, Path]] = {}

    def safetensors(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a safetensors file, in the file's dtypes, on the CPU.

        Raises:
            ModelUnavailableError: the file is missing, truncated or something else.
        """
        from safetensors.torch import load_file

        with _reading(path):
            return self._remember(path, load_file(path))

    def archive(self, path: Path) -> dict[str, Tensor] | None:
        """The tensors of a file of ``torch.save`` that is one flat dictionary of them, or ``None`` where it is not.

        Loaded with ``weights_only``: no code of the file's is run. Errors as in ``safetensors``.
        """
        with _reading(path):
            with open(path, "rb") as file:
                mappable = file.read(len(_ZIP)) == _ZIP
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            return None
        return self._remember(path, content) if mappable else content

    def path_of(self, tensors: Any) -> Path | None:
        """The file that a dictionary of tensors comes from, or ``None``."""
        for tensor in tensors.values() if hasattr(tensors, "values") else ():
            if isinstance(tensor, Tensor) and tensor.data_ptr() in self._tensors:
                return self._tensors[tensor.data_ptr()][2]
        return None

    def place(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A contiguous copy in memory of its own; the pages that the copy was read from are let go.

        One pass over the bytes: dtype and device change on the way. With ``keep``, a mapped tensor that is what is
        asked for already stays where it is.
        """
        source = self._tensors.get(tensor.data_ptr())
        as_asked = tensor.device == device and tensor.dtype == dtype and tensor.is_contiguous()
        if self._keep and source is not None and as_asked:
            return tensor.detach()
        copy = _copy(tensor.detach(), device, dtype)
        self.release(tensor)
        return copy

    def release(self, tensor: Tensor) -> None:
        """Let the pages of a mapped tensor go; the next access reads them from the file again."""
        source = self._tensors.get(tensor.data_ptr())
        # what somebody has written to a private mapping exists in its pages alone
        if source is not None and source[0].nbytes >= tensor.nbytes and source[1] == _version(tensor):
            release_mapped(tensor.data_ptr(), tensor.nbytes)

    def _remember(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._tensors.update({t.data_ptr(): (t, _version(t), path) for t in tensors.values() if t.nbytes})
        return tensors


def _copy(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    copy = torch.empty(tensor.shape, dtype=dtype)
    # by one thread: PyTorch's own would meet the others at the end of each of thousands of tensors
    np.copyto(copy.view(-1).view(torch.uint8).numpy(), tensor.view(-1).view(torch.uint8).numpy())
    return copy


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 under inference mode, where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise ModelUnavailableError(
            f"There is no {path.name} in {path.parent}.",
            "The folder lacks a file of the checkpoint, or holds another model's.",
            "Download the checkpoint again, or pass the folder of this model.",
        ) from error
    except Exception as error:  # safetensors, pickle, zip and the system each have their own
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelUnavailableError(
            f"Cannot read {path}: {cause}", "It is truncated, damaged or no checkpoint.", "Download it again."
        ) from error
