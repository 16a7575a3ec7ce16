"""Tensors as kernels for CPUs take them: arrays over the same memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..device.quantized import QuantizedMatrix


def array(matrix: Tensor) -> np.ndarray:
    """The same memory; bf16 as int16, which NumPy has no name for otherwise."""
    matrix = matrix.detach()
    return (matrix.view(torch.int16) if matrix.dtype == torch.bfloat16 else matrix).numpy()


def arrays(matrix: QuantizedMatrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros; these are empty where there are none."""
    zeros = np.empty((0, 0), np.int16) if matrix.zeros is None else array(matrix.zeros)
    return array(matrix.codes), array(matrix.scales), zeros
