"""Products of matrices in bf16 by the tile registers of Intel's AMX, for kernels that numba compiles.

A tile is 16 rows of 64 bytes. Tile C of fp32 (16, 16) takes the product of A, 16 rows of 16 pairs of bf16, and B, 16
pairs of rows of 16 columns. Tiles are told by number, and it is the kernel that knows what is in each.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .instructions import BYTE, I64, declare, has

ROWS = 16  # of a tile
ROW_BYTES = 64
_I8 = ir.IntType(8)
_PREFER, _TILE_DATA, _SYSCALL = 0x1023, 18, 158  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) on x86-64

_shape = np.zeros(64, np.uint8)  # what LDTILECFG reads
_shape[0] = 1
_shape[16:32].view(np.uint16)[:] = ROW_BYTES
_shape[48:56] = ROWS
SHAPE = tuple(int(word) for word in _shape.view(np.int64))


@functools.cache
def multiplies_tiles() -> bool:
    """Whether this processor has AMX for bf16, numba compiles for it, and the system lets this process use it.

    Linux saves tiles for a process that has asked for them, as oneDNN does before its own products.
    """
    if not (has("amx-tile") and has("amx-bf16") and has("avx512bf16")):
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        return ctypes.CDLL(None, use_errno=True).syscall(_SYSCALL, _PREFER, _TILE_DATA) == 0
    except (OSError, AttributeError):
        return False


@intrinsic
def take_tiles(typing_context):
    """Give every tile of this thread its shape; to be called before the others, in the same thread."""

    def generate(context, b, signature, arguments):
        words = ir.Constant(ir.ArrayType(I64, len(SHAPE)), SHAPE)
        shape = cgutils.alloca_once_value(b, words)
        b.call(declare(b, "llvm.x86.ldtilecfg", ir.VoidType(), [BYTE]), [b.bitcast(shape, BYTE)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_tiles_back(typing_context):
    """After it switches of threads need not save tiles any more."""

    def generate(context, b, signature, arguments):
        b.call(declare(b, "llvm.x86.tilerelease", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), generate


def clear_tile(b, tile):
    """Zeros."""
    b.call(declare(b, "llvm.x86.tilezero", ir.VoidType(), [_I8]), [_I8(tile)])


def load_tile(b, tile, pointer, stride):
    """Rows from an address on, ``stride`` bytes apart."""
    b.call(declare(b, "llvm.x86.tileloadd64", ir.VoidType(), [_I8, BYTE, I64]), [_I8(tile), pointer, stride])


def store_tile(b, tile, pointer, stride):
    """Write its rows, ``stride`` bytes apart."""
    b.call(declare(b, "llvm.x86.tilestored64", ir.VoidType(), [_I8, BYTE, I64]), [_I8(tile), pointer, stride])


def multiply_tiles(b, total, x, y):
    """Add to tile ``total`` the product of tiles x and y."""
    b.call(declare(b, "llvm.x86.tdpbf16ps", ir.VoidType(), [_I8] * 3), [_I8(total), _I8(x), _I8(y)])
