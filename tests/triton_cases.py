"""The Triton kernels of the decode step, run by Triton's interpreter or compiled for GPUs that are not here.

A script, as Triton decides at its import whether it interprets: ``TRITON_INTERPRET=1 python triton_cases.py interpret``
prints the largest error of each kernel in units of its format's rounding; ``python triton_cases.py compile`` the sizes
of the programs for capability 7.5 (which newer Triton has given up), 8.0 and 9.0. Kernels are compared with the
operations in plain torch.
"""

from __future__ import annotations

import inspect
import itertools
import json
import sys

import torch
from torch import Tensor

from chatterbox_turbo.runtime.layers import Norm
from chatterbox_turbo.runtime.t3 import operations as plain
from chatterbox_turbo.runtime.t3 import triton_kernels as kernels
from chatterbox_turbo.runtime.t3.operations import Product

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
generator = torch.Generator().manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def error(ours: Tensor, theirs: Tensor, dtype: torch.dtype | None = None) -> float:
    """In units of the last place of the largest value; the interpreter cuts where hardware rounds."""
    difference = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    return float(difference / torch.finfo(dtype or ours.dtype).eps)


def norms(dtype: torch.dtype):
    for (rows, width), bias, late in itertools.product(((1, 64), (3, 100), (2, 1024)), (None, 1), (None, 1)):
        norm = Norm(draw(width), bias and draw(width), 1e-5)
        x, y, late = draw(rows, width), draw(rows, width, dtype=dtype), late and draw(width)
        h = torch.empty(rows, width, dtype=dtype)
        kernels.add_norm(x, None, None, norm.weight, norm.bias, norm.eps, h)
        yield error(h, plain.add_norm(x, None, norm, dtype)[1])
        total = kernels.add_norm(x, y, late, norm.weight, norm.bias, norm.eps, h)
        expected = plain.add_norm(x, Product(y, late), norm, dtype)
        yield error(total, expected[0])
        yield error(h, expected[1])


def activations(dtype: torch.dtype):
    for (rows, width), late, gated in itertools.product(((1, 64), (3, 600)), (None, 1), (False, True)):
        wide = width * (2 if gated else 1)
        y, late = draw(rows, wide, dtype=dtype) * 3, late and draw(wide)
        yield error(kernels.activate(y, late, gated), plain.activate(Product(y, late), gated))


def attentions(dtype: torch.dtype):
    shapes = ((1, 1, 32, 64), (3, 2, 64, 160))
    for (rows, heads, width, capacity), parts, rotary, late in itertools.product(shapes, (1, 4), (0, 1), (None, 1)):
        qkv, late = draw(rows, 3 * heads * width, dtype=dtype), late and draw(3 * heads * width)
        turn = (draw(rows, width // 2), draw(rows, width // 2)) if rotary else (None, None)
        # more rows in the cache than in the step, and its rows apart: a layer of a larger one
        keys, values = draw(2, rows + 1, heads, capacity, width, dtype=dtype).unbind(0)
        lengths = torch.tensor([0, capacity - 1, 37])[:rows]
        q, k, v = plain.split_heads(Product(qkv, late), heads, plain.turning(*turn) if rotary else None)
        expected_keys, expected_values = keys.clone(), values.clone()
        expected_keys[torch.arange(rows), :, lengths] = k.to(dtype)
        expected_values[torch.arange(rows), :, lengths] = v.to(dtype)
        scores = torch.full((2, rows, capacity), -float("inf"))
        slots = torch.tensor([1, -1])[:heads]
        out = torch.empty(rows, heads * width, dtype=dtype)
        several = torch.empty(rows, heads, parts, width + 2) if parts > 1 else out
        kernels.attend(qkv, late, *turn, keys, values, lengths, several, scores, slots)
        if parts > 1:
            kernels.combine(several, out)
        yield error(keys, expected_keys)
        yield error(values, expected_values)
        given = torch.einsum("rhd,rhcd->rhc", q.to(dtype).float(), keys[:rows].float()) * width**-0.5
        given.masked_fill_(torch.arange(capacity) > lengths[:, None, None], -float("inf"))
        yield error(out, torch.einsum("rhc,rhcd->rhd", given.softmax(-1), values[:rows].float()).flatten(1))
        yield error(scores[1].softmax(-1), given[:, 0].softmax(-1), dtype)
        assert scores[0].eq(-float("inf")).all(), "a head that nobody watches"


def interpret() -> dict[str, float]:
    cases = {"norms": norms, "activations": activations, "attentions": attentions}
    return {f"{name} {dtype}": max(function(dtype)) for name, function in cases.items() for dtype in FORMATS}


def compile_all() -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    number = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    newer = "constexprs" in inspect.signature(ASTSource.__init__).parameters  # Triton 3.3
    sizes = {}
    for capability, dtype in itertools.product((80, 90) if newer else (75, 80, 90), FORMATS):
        if capability < 80 and dtype == torch.bfloat16:
            continue  # which those cards do not have
        h, x = number[dtype], "*fp32"
        strides = ("heads", "row_stride", "head_stride", "position_stride", "score_slot_stride", "score_row_stride")
        attend = {"qkv": h, "keys": h, "values": h, "lengths": "*i64", "scale": "fp32", **dict.fromkeys(strides, "i32")}
        rotary, watched = {"cosines": x, "sines": x}, {"scores": x, "slots": "*i64"}
        nothing = dict.fromkeys(("bias", "cosines", "sines", "scores", "slots"))
        flags = {"HAS_BIAS": False, "ROTARY": True, "WATCHED": False, "HALF": 32, "SIZE": kernels.POSITIONS}
        norm = {"x_from": x, "weight": x, "h_to": h, "width": "i32", "eps": "fp32"}
        cases = [
            (kernels._add_norm, {**norm, "y_from": h, "x_to": x},
             {"y_bias": None, "bias": None, "HAS_Y": True, "HAS_Y_BIAS": False, "CENTERED": False, "SIZE": 1024}),
            (kernels._add_norm, {**norm, "y_from": h, "y_bias": x, "bias": x, "x_to": x},
             {"HAS_Y": True, "HAS_Y_BIAS": True, "CENTERED": True, "SIZE": 1024}),
            (kernels._add_norm, {**norm, "x_to": x},
             {"y_from": None, "y_bias": None, "bias": None, "HAS_Y": False, "HAS_Y_BIAS": False, "CENTERED": False,
              "SIZE": 1024}),
            (kernels._activate, {"y_from": h, "to": h, "width": "i32"},
             {"y_bias": None, "HAS_BIAS": False, "GATED": True, "SIZE": kernels.COLUMNS}),
            (kernels._activate, {"y_from": h, "y_bias": x, "to": h, "width": "i32"},
             {"HAS_BIAS": True, "GATED": False, "SIZE": kernels.COLUMNS}),
            (kernels._attend, {**attend, **rotary, "out": x}, {**nothing, **flags, "SPLITS": 4}),
            (kernels._attend, {**attend, **rotary, **watched, "out": x},
             {**nothing, **flags, "SPLITS": 8, "WATCHED": True}),
            (kernels._attend, {**attend, "bias": x, "out": h},
             {**nothing, **flags, "SPLITS": 1, "HAS_BIAS": True, "ROTARY": False}),
            (kernels._combine, {"parts": x, "out": h}, {"SPLITS": 4, "WIDTH": 64}),
        ]  # fmt: skip
        for index, (kernel, signature, constants) in enumerate(cases):
            constants = {key: value for key, value in constants.items() if key not in signature}
            if newer:
                source = ASTSource(
                    kernel, {name: signature.get(name, "constexpr") for name in kernel.arg_names}, constants
                )
            else:
                known = {name: signature[name] for name in kernel.arg_names if name in signature}
                source = ASTSource(kernel, signature=known, constants=constants)
            program = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            sizes[f"{capability} {dtype} {index} {kernel.__name__}"] = len(program.asm["cubin"])
    return sizes


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else compile_all()))
