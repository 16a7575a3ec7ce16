"""T3's decode step on a CPU with full-size weights in fp32, bf16, int8 and int4, all in turns: speed by format.

Run: python benchmarks/quantized_step.py [english|turbo] [rows, as in 1,2,4,16] [turns]. Random numbers stand for the
weights, which does for speed. ``english`` is Llama's shape, that of the multilingual model as well.
"""

import statistics
import sys
import time

import torch

from chatterbox_turbo.measure.benchmark import read_bandwidth
from chatterbox_turbo.runtime.cpu.host_memory import use_huge_pages
from chatterbox_turbo.runtime.device.quantized import SCHEMES, QuantizedMatrix
from chatterbox_turbo.runtime.layers import Linear, Norm
from chatterbox_turbo.runtime.t3.cpu_step import CpuStep
from chatterbox_turbo.runtime.t3.kv_cache import KVCache
from chatterbox_turbo.runtime.t3.weights import Layer, Weights

FAMILY = sys.argv[1] if len(sys.argv) > 1 else "english"
ROWS = [int(rows) for rows in sys.argv[2].split(",")] if len(sys.argv) > 2 else [1, 2]
TURNS = int(sys.argv[3]) if len(sys.argv) > 3 else 7
FORMATS = ("fp32", "bf16", "int8", "int4")
LLAMA = FAMILY != "turbo"
WIDTH, INNER, LAYERS, TOKENS, HEADS = 1024, 4096, 30 if LLAMA else 24, 8194 if LLAMA else 6563, 16


def matrix(outputs, inputs, form):
    """Random weights of a format; of int8 and int4 random codes."""
    if form not in SCHEMES:
        return (torch.randn(outputs, inputs) / inputs**0.5).to(torch.bfloat16 if form == "bf16" else torch.float32)
    scheme = SCHEMES[form]
    shape, groups = (outputs, inputs * scheme.bits // 8), (outputs, inputs // scheme.group)
    largest = 2 ** (scheme.bits - 1) * inputs**0.5
    scales = torch.rand(groups).add(0.5).div(largest).bfloat16()
    if scheme.bits == 8:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8)
        return QuantizedMatrix(form, codes, scales, dtype=torch.bfloat16)
    codes, zeros = torch.randint(0, 256, shape, dtype=torch.uint8), torch.rand(groups).mul(15).bfloat16()
    return QuantizedMatrix(form, codes, scales, zeros, torch.bfloat16)


def backbone(form):
    """A whole backbone with its head, which is in bf16 where the blocks are not in fp32."""
    bias = None if LLAMA else torch.zeros(WIDTH)
    norm = Norm(torch.ones(WIDTH), bias, 1e-5)

    def linear(outputs, inputs):
        return Linear(matrix(outputs, inputs, form), None if LLAMA else torch.zeros(outputs))

    layers = [
        Layer(norm, linear(3 * WIDTH, WIDTH), linear(WIDTH, WIDTH), norm,
              linear(2 * INNER if LLAMA else INNER, WIDTH), linear(WIDTH, INNER))
        for _ in range(LAYERS)
    ]  # fmt: skip
    head = Linear(matrix(TOKENS, WIDTH, "fp32" if form == "fp32" else "bf16"))
    frequencies = torch.rand(WIDTH // HEADS // 2) if LLAMA else None
    positions = None if LLAMA else torch.zeros(1024, WIDTH)
    return Weights(tuple(layers), norm, head, HEADS, LLAMA, frequencies, positions=positions)


def main():
    """Print a table for each number of rows."""
    weights = {form: backbone(form) for form in FORMATS}
    steps, sizes = {}, {}
    for form, each in weights.items():
        use_huge_pages(each.storages())
        steps[form] = CpuStep(each)
        sizes[form] = sum(tensor.nbytes for tensor in each.storages())
    with torch.inference_mode():
        for rows in ROWS:
            caches, times, speeds = {}, {form: [] for form in FORMATS}, []
            for form, each in weights.items():
                caches[form] = KVCache(LAYERS, HEADS, each.head_width, steps[form].cache_dtype, each.device)
                caches[form].begin(rows)
                caches[form].ensure(256)
                caches[form].append(rows, 200)
            embeds = torch.randn(rows, WIDTH)
            for turn in range(TURNS + 1):
                if turn % 3 == 0:
                    speeds.append(read_bandwidth(torch.device("cpu")))
                for form, step in steps.items():
                    start = time.perf_counter()
                    step(caches[form], embeds)
                    times[form].append(time.perf_counter() - start)
            times, speed = {form: values[1:] for form, values in times.items()}, statistics.median(speeds)
            print(f"\n{FAMILY}, {rows} rows, {TURNS} turns, {torch.get_num_threads()} threads, {speed / 1e9:.1f} GB/s")
            for form, values in times.items():
                seconds = statistics.median(values)
                ratio = statistics.median(a / b for a, b in zip(times["bf16"], values, strict=True))
                print(
                    f"{form:>6}: {1e3 * seconds:6.1f} ms ({1e3 * min(values):.1f} to {1e3 * max(values):.1f}), "
                    f"{sizes[form] / 1e9:.2f} GB, {sizes[form] / seconds / 1e9:5.1f} GB/s, "
                    f"{sizes[form] / seconds / speed:4.0%} of the bandwidth, {ratio:.2f} times bf16's speed"
                )


if __name__ == "__main__":
    main()
