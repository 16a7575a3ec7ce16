"""Streamed speech against speech in one call, of the same tokens and noise: flow, vocoder, prompt, watermark.

python benchmarks/streaming.py [FAMILY] [SIZE] [TOKENS] [PARTS] [LOOK_AHEADS] [PROMPT_TOKENS]; "vc" is English's
acoustic half alone. Full: "vc full 100", "turbo full 125"; short: "vc tiny 60 vocoder". PARTS and LOOK_AHEADS have
commas between them; the parts are vocoder, mark, prompt, flow, share.
"""

from __future__ import annotations

import math
import sys
import time
import warnings

import numpy as np
import soundfile
import torch

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.measure.streaming import given, seam
from chatterbox_turbo.runtime.s3gen import flow_solver
from chatterbox_turbo.runtime.s3gen.streamed_vocoder import StreamedVocoder
from chatterbox_turbo.runtime.s3gen.streaming import AcousticStream, Windows
from chatterbox_turbo.runtime.s3gen.vocoder import random_phases
from chatterbox_turbo.runtime.s3gen.vocoder_network import Network
from chatterbox_turbo.runtime.voice.marking import GRID, MarkStream
from chatterbox_turbo.upstream import vocoder_weights
from chatterbox_turbo.upstream.flow_windows import FlowWindows

CHUNK = 25
CONTEXTS = (25, 50, 100, None)
HELD = ((6, 4), (8, 8), (8, 4), (10, 4), (12, 4), (12, 12), (16, 4))
ON = {"enabled": True}


class Utterance:
    """Random tokens with the random numbers of one utterance, by the passes of a model."""

    def __init__(self, model, count: int, prompt_tokens: int | None):
        self.s3gen, generator = model.s3gen, torch.Generator().manual_seed(0)
        reference = model.conds.gen if getattr(model, "conds", None) is not None else model.ref_dict
        self.before = reference["prompt_token"].long()
        if prompt_tokens is not None:
            self.before = self.before[:, -prompt_tokens:]
        self.tokens = torch.randint(0, 6561, (count,), generator=generator)
        prompt = torch.randn(1, 80, 2 * reference["prompt_token"].shape[1], generator=generator)
        self.flow = FlowWindows(self.s3gen, reference, prompt, prompt_tokens)
        self.noise = torch.randn(1, 80, 2 * count, generator=generator)
        weights = vocoder_weights.read(self.s3gen.mel2wav, fold=True)
        engines, source = (weights, Network(weights.network)), weights.source
        self._engines = lambda: engines
        self._phases = random_phases(source, 1, torch.device("cpu"))
        self._source_noise = torch.randn(1, source.harmonics, 960 * count, generator=generator)
        self.solved: dict[tuple[int, int], torch.Tensor] = {}

    def mels(self, tokens, first, noise):
        """A window of the flow, solved once."""
        key = (first, len(tokens))
        if key not in self.solved:
            self.solved[key] = self.flow(tokens, first, noise)
        return self.solved[key]

    def recorded(self, calls: list):
        """``mels`` that notes every window and where it begins."""

        def mels(tokens, first, noise):
            calls.append((first, self.mels(tokens, first, noise)))
            return calls[-1][1]

        return mels

    def stream(self, windows: Windows, mels=None) -> AcousticStream:
        vocoder = StreamedVocoder(self._engines, self._phases, given(self._source_noise))
        return AcousticStream(mels or self.mels, vocoder, given(self.noise), windows, self.s3gen.trim_fade)

    def blocks(self, windows: Windows, mels=None) -> list[torch.Tensor]:
        return list(self.stream(windows, mels).run(self.tokens.split(1)))

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel frames and samples of one call."""
        mel = self.mels(self.tokens, 0, self.noise)
        everything = Windows(first_chunk=len(self.tokens), held=0, faded=0)
        return mel, torch.cat(self.blocks(everything, lambda *_: mel))


def flow(utterance: Utterance, look_aheads: str) -> None:
    count, start = len(utterance.tokens), time.perf_counter()
    mel, samples = utterance.whole()
    print(f"one call for {count} tokens: {time.perf_counter() - start:.1f} s", flush=True)
    print("| look-ahead | context | mel frames, dB | by chunk | samples, dB | seam | frames solved for each of them |")
    for look_ahead in map(int, look_aheads.split(",")):
        for context in CONTEXTS:
            calls: list[tuple[int, torch.Tensor]] = []
            windows = Windows(CHUNK, CHUNK, 1, CHUNK, context=context, look_ahead=look_ahead, seen=0)
            got = utterance.blocks(windows, utterance.recorded(calls))
            cost = sum(utterance.flow.frames + window.size(2) for _, window in calls)
            streamed = torch.zeros_like(mel)
            for number, (first, window) in enumerate(calls):  # what one shows ahead, the next one solves again
                new = 2 * CHUNK * number
                streamed[..., new : 2 * first + window.size(2)] = window[..., new - 2 * first :]
            by_chunk = (snr_db(*pair) for pair in zip(streamed.split(50, 2), mel.split(50, 2), strict=True))
            print(
                f"| {look_ahead} | {'all' if context is None else context} | {snr_db(streamed, mel):.1f} |"
                f" {', '.join(f'{db:.0f}' for db in by_chunk)} | {snr_db(torch.cat(got), samples):.1f} |"
                f" {seam(torch.cat(got), [len(block) for block in got]):.2f} | {cost / (2 * count):.1f} |",
                flush=True,
            )


def share(utterance: Utterance) -> None:
    """Windows in which attention gives the prompt no more weight than it has beside all tokens: why they differ."""
    mel, _ = utterance.whole()
    count, frames, usual, factor = len(utterance.tokens), utterance.flow.frames, flow_solver._bias, 1.0

    def weighed(valid, times, dtype):
        bias = torch.zeros(1, 1, 1, valid_frames)
        bias[..., frames:] = math.log(factor)
        return (bias.expand(times, 1, 1, -1).to(dtype),)

    parts = []
    try:
        for new in range(0, count, CHUNK):
            end = min(count, new + CHUNK + 3)
            valid_frames, factor = frames + 2 * end, count / end
            flow_solver._bias = weighed
            window = utterance.flow(utterance.tokens[:end], 0, utterance.noise[..., : 2 * end])
            parts.append(window[..., 2 * new : 2 * min(count, new + CHUNK)])
    finally:
        flow_solver._bias = usual
    by_chunk = (snr_db(*pair) for pair in zip(parts, mel.split(2 * CHUNK, 2), strict=True))
    print(f"look-ahead 3, all context, weighed: {snr_db(torch.cat(parts, 2), mel):.1f} dB on mel frames,", end=" ")
    print("by chunk", ", ".join(f"{db:.0f}" for db in by_chunk))


def vocoder(utterance: Utterance) -> None:
    generator = torch.Generator().manual_seed(1)
    mel = 1.3 * torch.randn(1, 80, 2 * len(utterance.tokens), generator=generator)

    def mels(tokens, first, noise):
        return mel[..., 2 * first : 2 * (first + len(tokens))]

    expected = torch.cat(utterance.blocks(Windows(first_chunk=len(utterance.tokens), held=0, faded=0), mels))
    print("| held back | cross-faded | samples of equal mel frames, dB | seam |")
    for held, faded in HELD:
        got = utterance.blocks(Windows(CHUNK, CHUNK, 1, CHUNK, seen=0, held=held, faded=faded), mels)
        lengths = [len(block) for block in got]
        print(f"| {held} | {faded} | {snr_db(torch.cat(got), expected):.0f} | {seam(torch.cat(got), lengths):.2f} |")


@torch.inference_mode()
def prompt(utterance: Utterance) -> None:
    """What the encoder makes of the prompt before a window, and before all tokens."""
    flow, before = utterance.s3gen.flow, utterance.before

    def encode(tokens):
        tokens = torch.cat([before, tokens[None]], dim=1)
        return flow.encoder(flow.input_embedding(tokens), torch.tensor([tokens.size(1)]))[0][:, : 2 * before.size(1)]

    start = time.perf_counter()
    expected = encode(utterance.tokens)
    seconds = time.perf_counter() - start
    for n in (0, CHUNK + 3, 2 * CHUNK + 3, 3 * CHUNK + 3):
        print(f"prompt encoded before {n} of the tokens: {snr_db(encode(utterance.tokens[:n]), expected):.0f} dB")
    print(f"encoder, prompt and all tokens: {seconds:.2f} s")


def mark(model) -> None:
    speech = soundfile.read(synthetic.reference_voice(), dtype="float32")[0][24000 : 24000 * 7].copy()
    speech[:480] = 0

    def apply(samples):
        return model.watermarker.apply_watermark(samples, sample_rate=24000)

    @torch.inference_mode()
    def confidence(samples):
        return model.watermarker.get_watermark(samples, sample_rate=24000, round=False).mean()

    whole = apply(speech)
    print(f"in one piece: confidence {confidence(whole):.3f}; without a mark {confidence(speech):.3f}")
    print("| ahead, ms | samples, dB | seam | confidence | of the first second |")
    for ahead in (None, 0, 40, 80, 100, 120, 160, 200):
        parts = [speech[at : at + 9600] for at in range(0, len(speech), 9600)]
        if ahead is None:
            got = [apply(part) for part in parts]
        else:
            got = list(MarkStream(apply, ahead // 10 * GRID).run(parts))
        out, lengths = np.concatenate(got), [len(block) for block in got]
        closeness = snr_db(torch.from_numpy(out), torch.from_numpy(whole))
        name, step = "blocks alone" if ahead is None else ahead, seam(torch.from_numpy(out), lengths)
        print(f"| {name} | {closeness:.0f} | {step:.2f} | {confidence(out):.3f} | {confidence(out[:24000]):.3f} |")


def main(
    family: str = "vc",
    size: str = "full",
    count: str = "100",
    parts: str = "vocoder,mark,prompt,flow",
    look_aheads: str = "3,0,6,12,25",
    prompt_tokens: str = "",
) -> None:
    warnings.simplefilter("ignore")
    model = synthetic.build(family, size)
    nothing = {name: {"enabled": False} for name, _ in turbo.OptimizationConfig().sections()}
    turbo.apply(model, {**nothing, "flow": ON, "watermark": ON})
    utterance = Utterance(model, int(count), int(prompt_tokens) if prompt_tokens else None)
    for part in parts.split(","):
        print(f"--- {part}, {family}, {size}, {count} tokens, {utterance.flow.frames} mel frames of prompt", flush=True)
        if part == "flow":
            flow(utterance, look_aheads)
        elif part == "mark":
            mark(model)
        else:
            {"vocoder": vocoder, "prompt": prompt, "share": share}[part](utterance)


if __name__ == "__main__":
    main(*sys.argv[1:])
