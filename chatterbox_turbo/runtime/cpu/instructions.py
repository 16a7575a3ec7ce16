"""What kernels for CPUs are made of: vector instructions that numba has no words for, bf16, and its decorator.

bf16 numbers are handed in as int16, since NumPy has no name for them. ``b`` is llvmlite's builder.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LANES = 16  # fp32 numbers in an AVX-512 register; LLVM splits them where registers are narrower
F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
BYTE = ir.IntType(8).as_pointer()
VECTOR = ir.VectorType(F32, LANES)
PAIRS = ir.VectorType(I32, LANES)  # of bf16; or integers of as many bits

KERNELS: list = []  # every function that ``jit`` has decorated

EXACT = {"contract", "nnan", "ninf", "nsz"}  # no reassociation: the reduction of the argument depends on the order
FAST = {"contract", "nnan", "ninf", "nsz", "reassoc", "arcp"}


def jit(**options) -> Callable:
    """``njit`` that keeps its code on disk, where there is a place that can be written."""

    def decorate(function):
        try:
            kernel = njit(cache=True, **options)(function)
        except RuntimeError:  # no writable cache folder: compiled anew in every process
            kernel = njit(**options)(function)
        _outdate(kernel)
        _let_saving_fail(kernel)
        KERNELS.append(kernel)
        return kernel

    return decorate


def _outdate(kernel) -> None:
    """Have what is on disk of a kernel thrown away when the file of any kernel changes.

    Its code has those that it calls in it, and numba looks at its own file alone: after an update a kernel would go on
    computing with the former ones inside.
    """
    file = getattr(getattr(kernel, "_cache", None), "_cache_file", None)  # numba's own, as below
    if hasattr(file, "_source_stamp"):
        file._source_stamp = _digest()


@functools.cache
def _digest() -> str:
    """Of all files of kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _let_saving_fail(kernel) -> None:
    """Have a kernel that cannot be saved (a full disk) run all the same; it is compiled anew in the next process."""
    cache = getattr(kernel, "_cache", None)  # numba's own, which another release may have named otherwise
    save = getattr(cache, "save_overload", None)
    if save is None:
        return

    def save_overload(*arguments) -> None:
        try:
            save(*arguments)
        except OSError:
            with suppress(OSError):
                cache.flush()  # or the index would name what was not written, and an older kernel may lie there

    cache.save_overload = save_overload


def compilations() -> tuple[int, int]:
    """How many kernels this process has compiled, and how many it has found on disk; one for each kind of arguments."""
    stats = [kernel.stats for kernel in KERNELS]
    return sum(sum(s.cache_misses.values()) for s in stats), sum(sum(s.cache_hits.values()) for s in stats)


def kernel_folders() -> set[str] | None:
    """Where compiled kernels are kept; ``None`` where there is no folder that can be written."""
    folders = {kernel.stats.cache_path for kernel in KERNELS}
    return None if None in folders else folders


def multiplies_pairs() -> bool:
    """Whether this processor has AVX-512 BF16 and numba compiles for it, not for another that was asked for."""
    return has("avx512bf16")


def multiplies_integers() -> bool:
    """Whether this processor multiplies and adds small integers (AVX-512 VNNI), and numba compiles for it."""
    return has("avx512vnni") and has("avx512bw")


def has(feature: str) -> bool:
    """Whether this processor has a feature, by LLVM's name, and numba compiles for it."""
    if not _compiles_for_this():
        return False
    try:
        return get_host_cpu_features().get(feature, False)
    except RuntimeError:  # LLVM cannot tell on this system
        return False


def is_zen() -> bool:
    """Whether this processor is one of AMD's Zen, and numba compiles for it."""
    return _compiles_for_this() and get_host_cpu_name().startswith("znver")


def _compiles_for_this() -> bool:
    """Whether numba compiles for this processor as it is: no other was asked for, nor this one without AVX."""
    return bool(config.ENABLE_AVX) and not (config.CPU_NAME or config.CPU_FEATURES)


# How near a prefetch brings a line: 3 into every cache, 2 into all but the first. Zen's first cache waits for few lines
# at a time, and loads that find theirs there wait behind them.
NEAR = 2 if is_zen() else 3


def declare(b, name, result, arguments):
    """An LLVM intrinsic by its name and types."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def load(b, pointer, kind, align):
    """A value of ``kind`` from an address that is a multiple of ``align`` bytes."""
    loaded = b.load(b.bitcast(pointer, kind.as_pointer()))
    loaded.align = align
    return loaded


def store(b, value, pointer, align):
    """Write a value to an address that is a multiple of ``align`` bytes."""
    b.store(value, b.bitcast(pointer, value.type.as_pointer())).align = align


def prefetch(b, pointer, ahead):
    """Ask for the line ``ahead`` bytes behind an address, which will be read."""
    call = declare(b, "llvm.prefetch.p0i8", ir.VoidType(), [BYTE, I32, I32, I32])
    b.call(call, [b.gep(b.bitcast(pointer, BYTE), [ahead]), I32(0), I32(NEAR), I32(1)])


def multiply_add(b, x, y, total):
    """x * y + total of fp32 numbers or vectors of them, rounded once."""
    name = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
    return b.call(declare(b, f"llvm.fma.{name}", x.type, [x.type] * 3), [x, y, total])


def multiply_pairs(b, x, y, total):
    """total + x[0] y[0] + x[1] y[1] of vectors of pairs of bf16 (AVX-512 BF16)."""
    return b.call(declare(b, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, [VECTOR, PAIRS, PAIRS]), [total, x, y])


def multiply_words(b, x, y, total):
    """total + x[0] y[0] + x[1] y[1] of vectors of pairs of int16 (AVX-512 VNNI)."""
    return b.call(declare(b, "llvm.x86.avx512.vpdpwssd.512", PAIRS, [PAIRS] * 3), [total, x, y])


def multiply_bytes(b, x, y, total):
    """total + x[0] y[0] + ... + x[3] y[3] of vectors of four uint8 in x and four int8 in y (AVX-512 VNNI)."""
    return b.call(declare(b, "llvm.x86.avx512.vpdpbusd.512", PAIRS, [PAIRS] * 3), [total, x, y])


def repeat(b, end, step, values, body):
    """Emit ``for at in range(0, end, step): values = body(at, values)``, once at least; the last values."""
    before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("loop.end")
    b.branch(loop)
    b.position_at_end(loop)
    at, *old = (b.phi(value.type) for value in (I64(0), *values))
    new = body(at, old)
    following = b.add(at, I64(step))
    for phi, first, later in zip((at, *old), (I64(0), *values), (following, *new), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    b.cbranch(b.icmp_signed("<", following, end), loop, after)
    b.position_at_end(after)
    return new


def same(vector_type, number):
    """A constant vector of one number."""
    return ir.Constant(vector_type, [number] * LANES)


def spread(b, value, vector_type):
    """One value in every lane."""
    undefined = ir.Constant(vector_type, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, same(PAIRS, 0))


def fold(b, vector, combine):
    """What ``combine`` makes of a vector's lanes, halves onto halves."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        halves = (ir.Constant(ir.VectorType(I32, lanes), list(range(at, at + lanes))) for at in (0, lanes))
        vector = combine(*(b.shuffle_vector(vector, undefined, half) for half in halves))
    return b.extract_element(vector, I32(0))


@intrinsic
def _power_of_two(typing_context, exponent):
    """2 ** exponent (int32 from -126 to 127) as fp32, by its bits."""

    def generate(context, b, signature, arguments):
        return b.bitcast(b.shl(b.add(arguments[0], I32(127)), I32(23)), F32)

    return types.float32(types.int32), generate


@jit(fastmath=EXACT)
def exp(x):
    """e ** x in fp32 within 2 units in the last place, in operations that vectorize (Cody and Waite, 1980)."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.float32(math.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    f = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    return (p * f * f + f + np.float32(1.0)) * _power_of_two(np.int32(n))


@intrinsic
def _bits(typing_context, number):
    """The 32 bits of an fp32 number."""
    return types.uint32(types.float32), lambda context, b, _, arguments: b.bitcast(arguments[0], I32)


@intrinsic
def _number_of(typing_context, bits):
    """The fp32 number of 32 bits."""
    return types.float32(types.uint32), lambda context, b, _, arguments: b.bitcast(arguments[0], F32)


ROUNDER = np.float32(1.5 * 2**23)  # a number of this size has no digits behind the point


@jit(fastmath=EXACT)
def to_integer(x):
    """fp32 from -2 ** 22 to 2 ** 22 as int32, ties to even, in operations that vectorize."""
    return np.int32(_bits(x + ROUNDER)) - np.int32(0x4B400000)


@jit()
def to_bf16(x):
    """The bits of x in bf16, ties to even."""
    bits = _bits(x)
    upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # NaN stays one; told by its bits, since a caller's fast arithmetic, which numba hands down, knows no NaN
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.int16(np.uint32(0x7FC0) if is_nan else upper)


def widen(x):
    """fp32, or the bits of bf16, as fp32."""


@overload(widen)
def _choose_widening(x):
    if x == types.float32:
        return lambda x: x
    return lambda x: _number_of(np.uint32(np.uint16(x)) << np.uint32(16))


def narrow(x, like):
    """x as what ``like`` is: fp32, or the bits of bf16."""


@overload(narrow)
def _choose_narrowing(x, like):
    return (lambda x, like: x) if like == types.float32 else (lambda x, like: to_bf16(x))


@jit()
def round_to_bf16(x, rounded):
    """``rounded`` (R, K) int16: x in bf16, ties to even."""
    for r in range(x.shape[0]):
        for k in range(x.shape[1]):
            rounded[r, k] = to_bf16(x[r, k])
