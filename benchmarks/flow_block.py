"""A transformer block of the flow estimator by each way to compute it on this CPU, in turns; and int8 products.

Run: python benchmarks/flow_block.py [frames] [rounds]. Two rows, as guidance has; milliseconds, median (least to most).
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F

from chatterbox_turbo.runtime.layers import Linear, Norm
from chatterbox_turbo.runtime.s3gen import attention, tiled_block
from chatterbox_turbo.runtime.s3gen.flow_estimator import Block, _transform
from chatterbox_turbo.runtime.s3gen.scratch import Scratch

FRAMES = int(sys.argv[1]) if len(sys.argv) > 1 else 900
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 9
SIZES = {"qkv": (1536, 256), "out": (256, 512), "up": (1024, 256), "down": (256, 1024)}


def block(dtype):
    """Random weights of the real sizes."""
    norm, layers = Norm(torch.ones(256), torch.zeros(256), 1e-5), []
    for name, size in SIZES.items():
        weight = (torch.randn(size) / size[1] ** 0.5).to(dtype)
        layers.append(Linear(weight, None if name == "qkv" else torch.zeros(size[0]).to(dtype)))
    qkv, out, up, down = layers
    return Block(norm, qkv, out, norm, up, down)


def routes():
    """Name to a function that computes a block, or its attention."""
    suits, kernels = tiled_block.suits, attention._kernels()
    x, scratch = torch.randn(2, FRAMES, 256), Scratch()
    plain, half = block(torch.float32), block(torch.bfloat16)
    parts = torch.randn(2, FRAMES, 3, 8, 64).bfloat16().unbind(dim=2)

    def by(some, tiled, run):
        def routed():
            attention._kernels, tiled_block.suits = (lambda: some), suits if tiled else (lambda *_: False)
            run()

        return routed

    def attend():
        attention.attend(*(part.transpose(1, 2) for part in parts), None, Scratch())

    yield "fp32, torch", by((), False, lambda: _transform(plain, x, 8, None, scratch, None))
    for some, names in ((kernels[-1:], "pairs"), (kernels[:1], "tiles")):
        if kernels:
            yield f"bf16, attention by {names}", by(some, False, lambda: _transform(half, x, 8, None, scratch, None))
            yield f"its attention by {names}", by(some, False, attend)
    yield "bf16, whole by tiles", by(kernels, True, lambda: _transform(half, x, 8, None, scratch, None))
    yield "products in bf16, torch", lambda: products(half)
    if hasattr(torch.ops.onednn, "qlinear_prepack"):
        packed = integers()
        yield "products in int8, oneDNN", lambda: multiply(packed)


def products(half):
    """The four products of a block by torch."""
    for name in SIZES:
        F.linear(INPUTS[name], getattr(half, name).weight)


INPUTS = {name: torch.randn(2 * FRAMES, size[1]).bfloat16() for name, size in SIZES.items()}


def integers():
    """What oneDNN multiplies: activations in 8 bits with one scale for all, weights with one for each output."""
    result = []
    for outputs, inputs in SIZES.values():
        codes = torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8)
        weight = torch.ops.onednn.qlinear_prepack(codes, [2 * FRAMES, inputs])
        x = torch.randint(0, 255, (2 * FRAMES, inputs), dtype=torch.uint8)
        result.append((x, weight, torch.rand(outputs), torch.zeros(outputs, dtype=torch.int64)))
    return result


def multiply(packed):
    """The four products; activations are given in 8 bits."""
    for x, weight, scales, zeros in packed:
        torch.ops.onednn.qlinear_pointwise(
            x, 0.01, 128, weight, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )


@torch.inference_mode()
def main():
    """Print a table."""
    compared = dict(routes())
    times = {name: [] for name in compared}
    for _ in range(ROUNDS + 1):
        for name, run in compared.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, (_, *values) in times.items():
        print(f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |")


if __name__ == "__main__":
    main()
