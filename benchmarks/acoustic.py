"""Flow matching and vocoder of a full-size model: upstream against this package's, in turns.

python benchmarks/acoustic.py [FAMILY] [FRAMES] [ROUNDS] [FORMAT]; "vc" is English's acoustic half alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.runtime.s3gen.flow_solver import schedule
from chatterbox_turbo.upstream import flow_weights

NOTHING = {name: {"enabled": False} for name, _ in turbo.OptimizationConfig().sections()}
BF16 = {"precision": {"flow": "auto"}}
SOLVER, VOCODER = {"flow": {}}, {"vocoder": {}}


def only(*sections: dict, **flow: int) -> dict:
    """These sections demanded with options of the flow, all others off."""
    asked = {name: {"enabled": True, **options} for section in sections for name, options in section.items()}
    asked["flow"] = {**asked.get("flow", {"enabled": False}), **flow}
    return {"fidelity": "lossy", **NOTHING, **asked}


def variants(steps: int, guided: bool) -> dict[str, dict | None]:
    """What is compared, by name."""
    half = steps // 2
    table = {
        "upstream": None,
        "fp32": only(SOLVER),
        "bf16": only(SOLVER, BF16),
        f"fp32, {half} steps": only(SOLVER, steps=half),
        f"bf16, {half} steps": only(SOLVER, BF16, steps=half),
    }
    if guided:
        table[f"fp32, {half} of {steps} steps guided"] = only(SOLVER, guided_steps=half)
        for fewer, first in ((6, 4), (6, 3), (5, 3), (4, 4), (4, 3), (4, 2), (3, 3)):
            table[f"bf16, {fewer} steps, {first} guided"] = only(SOLVER, BF16, steps=fewer, guided_steps=first)
    return table


def main(family: str = "english", frames: str = "900", rounds: str = "3", only_format: str = "") -> None:
    model = synthetic.build(family, "full")
    decoder, mean_flow = model.s3gen.flow.decoder, flow_weights.is_mean_flow(model.s3gen)
    steps = 2 if mean_flow else 10
    generator = torch.Generator().manual_seed(0)
    noise, mean, condition = (torch.randn(1, 80, int(frames), generator=generator) for _ in range(3))
    speaker = torch.randn(1, 80, generator=generator)
    times = schedule(steps, not mean_flow, noise.device)

    def solve() -> torch.Tensor:
        function = decoder.basic_euler if mean_flow else decoder.solve_euler
        return function(noise, times, mean, torch.ones_like(noise[:, :1]), speaker, condition)

    def vocode() -> torch.Tensor:
        torch.manual_seed(0)
        return model.s3gen.mel2wav.inference(speech_feat=mean[..., : int(frames) * 4 // 9])[0]

    print(f"flow matching, {frames} frames, {steps} steps: seconds (min to max), ratio, SNR, mean distance of log-mels")
    compared = {name: config for name, config in variants(steps, not mean_flow).items() if only_format in name}
    table(model, {"upstream": None} | compared, solve, int(rounds))
    print(f"vocoder, {int(frames) * 4 // 9} frames")
    table(model, {"upstream": None, "fp32": only(VOCODER)}, vocode, int(rounds))


def table(model, configs: dict[str, dict | None], run: Callable[[], torch.Tensor], rounds: int) -> None:
    """Every configuration in turns, the order reversed from round to round; one row each."""
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    results: dict[str, torch.Tensor] = {}
    for number in range(rounds):
        for name in sorted(configs, key=list(configs).index, reverse=bool(number % 2)):
            with turbo.optimized(model, configs[name] or NOTHING), torch.inference_mode():
                run() if number == 0 else None  # a warm-up of each
                start = time.perf_counter()
                results[name] = run()
                seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["upstream"], taken, strict=True))
        ours, reference = results[name], results["upstream"]
        closeness = f"{snr_db(ours, reference):.0f} dB, {(ours - reference).abs().mean():.3f}"
        span = f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})"
        print(f"| {name} | {span} | {ratio:.2f}x | {closeness} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
