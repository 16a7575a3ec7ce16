"""A safetensors file written tensor by tensor: no more of it is in memory than what is being written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Form = tuple[torch.dtype, tuple[int, ...]]  # of a tensor: its format and shape


def form_of(tensor: Tensor) -> Form:
    """Format and shape."""
    return tensor.dtype, tuple(tensor.shape)


def form_bytes(form: Form) -> int:
    """Of a tensor of this format and shape."""
    return math.prod(form[1]) * form[0].itemsize


class TensorFile:
    """A new file for tensors of known formats and shapes, in any order; it is whole once ``close`` has returned.

    Args:
        path: must not exist.
        forms: format and shape of each tensor, by name.

    Raises:
        ValueError: safetensors has no such format.
    """

    def __init__(self, path: Path, forms: Mapping[str, Form]):
        self._forms, self._at = dict(forms), {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # wide formats first: readers map each tensor where it lies, and it must lie at a multiple of its width
        for name, form in sorted(forms.items(), key=lambda item: -item[1][0].itemsize):
            if form[0] not in _NAMES:
                raise ValueError(f"{name} is {form[0]}, for which safetensors has no name")
            self._at[name], start, end = end, end, end + form_bytes(form)
            header[name] = {"dtype": _NAMES[form[0]], "shape": list(form[1]), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._left = 8 + len(text), set(forms)
        self._file = open(path, "xb")  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place.

        Raises:
            ValueError: it is of another format or shape than was said, or there already.
        """
        if form_of(tensor) != self._forms[name] or name not in self._left:
            raise ValueError(f"{name} is {form_of(tensor)}, expected once: {self._forms[name]}")
        self._left.remove(name)
        self._file.seek(self._start + self._at[name])
        if tensor.numel():
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def close(self) -> None:
        """End the file.

        Raises:
            ValueError: a tensor is missing.
        """
        self._file.close()
        if self._left:
            raise ValueError(f"never written: {', '.join(sorted(self._left))}")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
