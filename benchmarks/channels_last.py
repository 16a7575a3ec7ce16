"""Would S3Gen's convolutions be faster in channels_last? On a CPU, every convolution of one part, in turns.

python benchmarks/channels_last.py [tokenizer|campplus|flow|vocoder] [float32|bfloat16] [ROUNDS]

The shapes are those of a real call: a reference of 10 s, flow matching over 900 frames (guided), a vocoder over 2 s.
``kept``: input and output lie in channels_last, as in a network that stays in it; ``there and back``: a convolution
among other layers. One-dimensional ones become two-dimensional of height 1. ``products``: one matrix product for each
place of the kernel, over rows (T, C), where there is no stride, dilation or group. The flow's own layout is rows, which
are channels_last already: there ``as it is`` is ``conv1d`` over transposed rows.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.cpu.onednn import linear
from chatterbox_turbo.runtime.s3gen import flow_estimator
from chatterbox_turbo.runtime.s3gen.frames import Conv, convolve
from chatterbox_turbo.runtime.s3gen.scratch import Scratch
from chatterbox_turbo.upstream import flow_weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)
LAST = torch.channels_last


def part_of(s3gen: nn.Module, name: str) -> tuple[nn.Module, Callable[[], object]]:
    """A part, and a call of it as upstream makes one."""
    if name == "tokenizer":
        return s3gen.tokenizer, lambda: s3gen.tokenizer([torch.randn(160_000)])
    if name == "campplus":
        return s3gen.speaker_encoder, lambda: s3gen.speaker_encoder(torch.randn(1, 998, 80))
    if name == "vocoder":
        return s3gen.mel2wav, lambda: s3gen.mel2wav.inference(speech_feat=torch.randn(1, 80, 100))
    estimator, frames, some = s3gen.flow.decoder.estimator, torch.randn(2, 80, 900), torch.rand(2)
    return estimator, lambda: estimator(frames, torch.ones(2, 1, 900), frames, some, frames[..., 0], frames)


def called(part: nn.Module, run: Callable[[], object]) -> Counter[tuple[nn.Module, tuple[int, ...]]]:
    """The convolutions of one call with the shapes that they get; alike ones counted, the first stands for them."""
    seen: dict[tuple, tuple[nn.Module, tuple[int, ...]]] = {}
    counts: Counter[tuple] = Counter()

    def note(module: nn.Module, args: tuple) -> None:
        key = (str(module), tuple(args[0].shape))
        seen.setdefault(key, (module, key[1]))
        counts[key] += 1

    hooks = [m.register_forward_pre_hook(note) for m in part.modules() if isinstance(m, CONVOLUTIONS)]
    run()
    for hook in hooks:
        hook.remove()
    return Counter({seen[key]: number for key, number in counts.items()})


def variants(
    module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, rows_first: bool
) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute one convolution, each from the layout that it likes; ``rows_first``: the part has (T, C)."""
    weight, flat = module.weight.detach().to(dtype), isinstance(module, nn.Conv2d)
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    x, transposed = torch.randn(shape).to(dtype), isinstance(module, nn.ConvTranspose1d)
    if rows_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    names = ("stride", "padding", "dilation", "groups") + ("output_padding",) * transposed
    options = {name: getattr(module, name) for name in names}
    plain = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.ConvTranspose1d: F.conv_transpose1d}[
        next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
    ]
    two, of_two = F.conv_transpose2d if transposed else F.conv2d, dict(options)
    raised, high = x, weight
    if not flat:
        raised, high = x[:, :, None], weight[:, :, None]
        of_two |= {name: (int(name in ("stride", "dilation")), *options[name]) for name in names if name != "groups"}
    raised_last, high_last = raised.to(memory_format=LAST), high.to(memory_format=LAST)

    def there_and_back() -> Tensor:
        return two(raised.to(memory_format=LAST), high_last, bias, **of_two).contiguous()

    ways = {
        "as it is": lambda: plain(x, weight, bias, **options),
        "kept": lambda: two(raised_last, high_last, bias, **of_two),
        "there and back": there_and_back,
    }
    ones = (options["stride"], options["dilation"], options["groups"]) == ((1,), (1,), 1)
    if isinstance(module, nn.Conv1d) and ones:
        (padding,), places = options["padding"], weight.size(-1)
        rows, each = F.pad(x, (padding, padding)).transpose(1, 2).contiguous(), weight.permute(2, 0, 1).contiguous()
        length = rows.size(1) - places + 1

        def products() -> Tensor:
            total = F.linear(rows[:, :length], each[0], bias)
            for place in range(1, places):
                total += F.linear(rows[:, place : place + length], each[place])
            return total.transpose(1, 2)

        ways["products"] = products
    return ways


def totals(
    layers: Counter, dtype: torch.dtype, rounds: int, rows_first: bool
) -> Iterator[tuple[str, list[float], float]]:
    """For each way: seconds of all convolutions in each round, and the worst SNR; as it is where there is no other."""
    seconds: dict[str, list[float]] = {}
    worst: dict[str, float] = {}
    for (module, shape), number in layers.items():
        ways = variants(module, shape, dtype, rows_first)
        reference = ways["as it is"]().float()
        for name in ("as it is", "kept", "there and back", "products"):
            way = ways.get(name, ways["as it is"])
            worst[name] = min(worst.get(name, 999.0), snr_db(way().float().view_as(reference), reference))
        for one in range(rounds):
            for name in sorted(worst, reverse=bool(one % 2)):
                start = time.perf_counter()
                ways.get(name, ways["as it is"])()
                taken = seconds.setdefault(name, [0.0] * rounds)
                taken[one] += number * (time.perf_counter() - start)
    for name in worst:
        yield name, seconds[name], worst[name]


@torch.no_grad()
def main(name: str = "campplus", dtype: str = "float32", rounds: str = "5") -> None:
    model = synthetic.build("vc", "full")
    part, run = part_of(model.s3gen, name)
    layers = called(part, run)
    kinds = Counter()
    for (module, _), number in layers.items():
        kinds[type(module).__name__] += number
    print(
        f"{name}, {dtype}, {torch.get_num_threads()} threads: {dict(kinds)}, {len(layers)} kinds; milliseconds a call"
    )
    base = None
    for way, taken, closeness in totals(layers, getattr(torch, dtype), int(rounds), name == "flow"):
        middle = statistics.median(taken)
        base = base or middle
        span = f"{1e3 * middle:.1f} ({1e3 * min(taken):.1f} to {1e3 * max(taken):.1f})"
        print(f"| {way} | {span} | {base / middle:.2f}x | {closeness:.0f} dB |", flush=True)
    if dtype == "float32" and "Conv2d" in kinds:
        two_dimensional = [module for module in part.modules() if isinstance(module, nn.Conv2d)]

        def lay(layout: torch.memory_format) -> None:
            for module in two_dimensional:
                module.to(memory_format=layout)

        whole(
            run,
            {"whole part": lambda: lay(torch.contiguous_format), "its 2-D in channels_last": lambda: lay(LAST)},
            rounds,
        )
    if name == "flow":
        step(model, dtype, rounds)


def by_conv2d(conv: Conv, x: Tensor) -> Tensor:
    """``frames.convolve`` in channels_last, which rows are already: images of height 1."""
    x, width = x.to(conv.weight.dtype), conv.weight.size(-1)
    if width == 1:
        return linear(x, conv.weight[..., 0], conv.bias)
    x = F.pad(x, (0, 0, width - 1, 0)).transpose(1, 2)
    return F.conv2d(x[:, :, None], conv.weight[:, :, None], conv.bias)[:, :, 0].transpose(1, 2)


def step(model, dtype: str, rounds: str) -> None:
    """A whole guided step of the flow over 900 frames, convolutions as the package has them and in channels_last."""
    turbo.apply(model, {"fidelity": "lossy", "flow": {"enabled": True}, "precision": {"flow": dtype}})
    weights, scratch = flow_weights.read(model.s3gen), Scratch()
    state, mean = torch.randn(1, 900, 80), torch.randn(2, 900, 80)
    times = flow_weights.time_projections(model.s3gen, torch.tensor([0.0, 0.1]))[0]
    start = flow_estimator.constant(weights, mean, torch.randn(2, 80), mean)

    def use(function: Callable) -> Callable[[], None]:
        return lambda: setattr(flow_estimator, "convolve", function)

    ways = {"whole step": use(convolve), "whole step in channels_last": use(by_conv2d)}
    whole(lambda: flow_estimator.velocity(weights, state, start, times, None, scratch), ways, rounds)


def whole(run: Callable[[], object], ways: dict[str, Callable[[], None]], rounds: str) -> None:
    """``run`` after each way of setting it up, in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for one in range(int(rounds) + 1):
        for way, set_up in ways.items():
            set_up()
            start = time.perf_counter()
            run()
            if one:
                seconds[way].append(time.perf_counter() - start)
    base = statistics.median(next(iter(seconds.values())))
    for way, taken in seconds.items():
        span = f"{1e3 * statistics.median(taken):.0f} ({1e3 * min(taken):.0f} to {1e3 * max(taken):.0f})"
        print(f"| {way} | {span} | {base / statistics.median(taken):.2f}x | |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
