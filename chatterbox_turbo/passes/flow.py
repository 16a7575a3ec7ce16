"""Flow matching by this package's own solver in place of upstream's two Euler loops.

Replaces ``solve_euler`` (guided) and ``basic_euler`` (mean flow) of upstream's ``models/s3gen/flow_matching.py`` and,
inside them, the estimator's ``forward``; and before them the encoder's. The noise is still drawn by upstream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FlowSection
from ..errors import InvalidRequestError
from ..runtime.device.attention_kernels import Wanted, choose
from ..runtime.device.autocasting import inside
from ..runtime.device.compilation import compiled
from ..runtime.device.devices import arriving
from ..runtime.s3gen.flow_estimator import velocity
from ..runtime.s3gen.flow_solver import FlowSolver, schedule
from ..runtime.s3gen.frames import stacked, valid_frames
from ..runtime.s3gen.speech_encoder import SpeechEncoder, attention_format
from ..upstream import encoder_weights, flow_inputs, flow_weights
from ..upstream.flow_inputs import FlowInputs
from ..upstream.prepared import Prepared
from ..upstream.t3 import TOKENS_PER_SECOND
from .base import Arguments, Context, Pass, Setting, Switch

FRAMES_PER_TOKEN = 2
CPU_BATCH_FRAMES, CUDA_BATCH_FRAMES = 2_000, 32_000  # 40 s, which is where a CPU has nothing more to gain; 11 min


class FlowPass(Pass):
    """Solves with what does not change between steps computed once, and without masks where nothing is padded."""

    name = "flow"
    summary = "flow matching: constant parts once, no masks, buffers kept; optionally fewer steps"
    replaces = (
        "s3gen.flow.decoder.solve_euler",
        "s3gen.flow.decoder.basic_euler",
        "s3gen.flow.decoder.estimator.forward",
        "s3gen.flow.encoder.forward",
    )
    patch_points = (*replaces, "s3gen.flow_inference")

    def check(self, context: Context) -> str:
        section, s3gen = context.config.flow, context.parts.s3gen
        reason = flow_weights.why_not(s3gen, context.journal) or encoder_weights.why_not(s3gen, context.journal)
        if reason:
            return reason
        if section.guided_steps is not None and flow_weights.is_mean_flow(s3gen):
            return "flow.guided_steps is set, but the model works without guidance"
        return ""

    def apply(self, context: Context) -> str:
        section, s3gen, journal = context.config.flow, context.parts.s3gen, context.journal
        flow_weights.fuse(s3gen, journal)
        encoder_weights.fuse(s3gen, journal)
        flow = Flow(s3gen, section, context.attention, context.around.get("flow"))
        journal.record("buffers of the flow solver", flow.release, redo=lambda: None)  # as in decoding
        remark = flow.prepare()
        name = "basic_euler" if flow_weights.is_mean_flow(s3gen) else "solve_euler"
        decoder, encoder = s3gen.flow.decoder, s3gen.flow.encoder

        def encode(wrapped, instance, args, kwargs):
            flow.check_tokens()
            return flow.encoder_calls(*args, **kwargs)

        journal.wrap(encoder, "forward", encode)
        journal.wrap(decoder, name, lambda wrapped, instance, args, kwargs: flow.solver_calls(*args, **kwargs))

        def infer(wrapped, instance, args, kwargs):
            tokens, *others = args or (kwargs["speech_tokens"],)
            options = {name: value for name, value in kwargs.items() if name != "speech_tokens"}
            return wrapped(flow.watched(tokens), *others, **flow.own(options))

        journal.wrap(s3gen, "flow_inference", infer)
        context.engines.flow = flow
        context.prepared[self.name] = flow.prepared
        context.remarks[self.name] = flow.remark
        return remark


class Flow:
    """Speech tokens to hidden states, and noise to mel frames, in upstream's terms.

    ``encoder_calls`` and ``solver_calls`` are those of upstream's functions; ``encode_all`` and ``solve_all`` answer
    several of them at once. ``attention``: what ``flow`` and ``encoder`` are to attend by.
    """

    def __init__(
        self, s3gen: nn.Module, section: FlowSection, attention: Mapping[str, Wanted], around: Setting | None = None
    ):
        self._s3gen, self._section, self._attention, self._around = s3gen, section, attention, around
        self.prepared: Prepared[tuple[SpeechEncoder, FlowSolver]] = Prepared(
            lambda: (flow_weights.estimator_of(s3gen), encoder_weights.encoder_of(s3gen)), self._make, _release
        )
        self._bounds: Callable[[], Tensor] | None = None
        self.encoder_calls, self.solver_calls = Switch(self.encode), Switch(self.solve)

    @property
    def solver(self) -> FlowSolver | None:
        """The solver, with its graphs, where one is prepared."""
        return None if self.prepared.value is None else self.prepared.value[1]

    def prepare(self) -> str:
        """Read the weights as they are now; the remark for the report."""
        return self.prepared.renew()

    def remark(self) -> str:
        """How it computes, for the report."""
        return self.prepared.remark

    def release(self) -> None:
        """Give the memory of encoder and solver back."""
        self.prepared.release()

    def _make(self) -> tuple[tuple[SpeechEncoder, FlowSolver], str]:
        remarks, function = [], velocity
        weights, encoder = flow_weights.read(self._s3gen), encoder_weights.read(self._s3gen)
        cuda = weights.device.type == "cuda"
        if self._section.compile:
            function, reason = compiled(velocity, device=weights.device, dynamic=not cuda)
            remarks.append(f"not compiled: {reason}" if reason else "compiled")
        if self._around is not None:  # of the velocity alone: a runner of graphs keeps it out
            function = inside(self._around, function)
        graphs = self._section.graphs and cuda and self._around is None
        if graphs:
            remarks.append("CUDA graphs")
        kernels, attends = {}, attention_format(encoder_weights.format_of(self._s3gen), weights.device)
        for part, dtype, width in (
            ("flow", weights.dtype, flow_weights.head_width(self._s3gen)),
            ("encoder", attends, encoder_weights.head_width(self._s3gen)),
        ):
            wanted = self._attention.get(part)
            kernels[part], chosen = choose(wanted, dtype, weights.device, width, positions=part == "encoder")
            remarks += [f"{part}'s {chosen}"] if chosen else []
        solver = FlowSolver(weights, not graphs, function, lambda: self.prepared.generation, kernels["flow"])
        costs = _costs(self._section, flow_weights.is_mean_flow(self._s3gen))
        remark = ", ".join([str(weights.dtype).removeprefix("torch."), *remarks, *costs])
        return (SpeechEncoder(encoder, kernels["encoder"]), solver), remark

    def batch_frames(self) -> int:
        """Frames, padding included, that a batch of utterances has at most."""
        cuda = self._s3gen.flow.decoder.estimator.final_proj.weight.is_cuda
        return self._section.batch_frames or (CUDA_BATCH_FRAMES if cuda else CPU_BATCH_FRAMES)

    def watched(self, tokens: Tensor) -> Tensor:
        """Speech tokens that the embedding can read, whatever they were; ``check_tokens`` refuses them later.

        Their bounds are on the way to the host while upstream prepares, and waits for the device by itself.
        """
        if not tokens.numel():
            raise InvalidRequestError(
                "There are no speech tokens.",
                "Speech ended before its first token.",
                "Change the text, the seed or the voice.",
            )
        self._bounds = arriving(torch.stack(tokens.aminmax()))
        return tokens.clamp(0, self._s3gen.flow.input_embedding.num_embeddings - 1)

    def check_tokens(self) -> None:
        """Refuse what upstream fails on in a convolution or, on CUDA, in a way that ends the process.

        Raises:
            InvalidRequestError: a token that was watched last is none.
        """
        bounds, self._bounds = self._bounds, None
        if bounds is None:
            return
        (least, most), count = bounds().tolist(), self._s3gen.flow.input_embedding.num_embeddings
        if least < 0 or most >= count:
            raise InvalidRequestError(
                f"Speech token {least if least < 0 else most} is out of range.",
                f"The flow has embeddings for 0 to {count - 1}; special tokens have no sound.",
                "Leave them out (drop_invalid_tokens of chatterbox.models.s3tokenizer).",
            )

    def own(self, options: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of ``flow_inference`` with a reference of their own, which upstream casts in place."""
        reference = options.get("ref_dict")
        if reference is None:
            return options
        reference, seconds = dict(reference), self._section.prompt_seconds
        if seconds is not None:  # the end of the prompt: speech goes on from there
            tokens = int(seconds * TOKENS_PER_SECOND)
            for name, count in (("prompt_token", tokens), ("prompt_feat", tokens * FRAMES_PER_TOKEN)):
                reference[name] = reference[name][:, -count:]
            length = reference["prompt_token"].shape[1]
            reference["prompt_token_len"] = torch.as_tensor(reference["prompt_token_len"]).clamp(max=length)
        return {**options, "ref_dict": reference}

    def inputs(self, tokens: Tensor, reference: dict[str, Any]) -> FlowInputs:
        """What speech tokens (n,) are in the voice of a reference, for ``mels``.

        Raises:
            InvalidRequestError: there are no tokens, or one of them is none.
        """
        self.prepared.current()  # the part is on the device
        tokens = self.watched(tokens)
        self.check_tokens()
        return flow_inputs.read(self._s3gen, tokens, self.own({"ref_dict": reference})["ref_dict"])

    def draw(self, inputs: FlowInputs) -> Tensor:
        """The noise (1, 80, frames) of one utterance, reference included; random numbers as upstream draws them."""
        return flow_inputs.draw(self._s3gen, inputs)

    @torch.inference_mode()
    def mels(self, each: Sequence[FlowInputs], noises: Sequence[Tensor], steps: int | None) -> list[Tensor]:
        """Mel frames (1, 80, 2 n) of several utterances, each from its noise, in one batch; ``steps``: upstream's."""
        s3gen = self._s3gen
        encoded = self.encode_all([((one.embedded, one.length), {}) for one in each])
        calls = [
            flow_inputs.solver_call(s3gen, one, states, mask, noise, steps)
            for one, (states, mask), noise in zip(each, encoded, noises, strict=True)
        ]
        solved = self.solve_all([((), call) for call in calls])
        return [flow_inputs.utterance(one, frames) for one, frames in zip(each, solved, strict=True)]

    @torch.inference_mode()
    def encode(
        self, xs: Tensor, xs_lens: Tensor, decoding_chunk_size: int = 0, num_decoding_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (B, 2 T, D) and their mask (B, 1, 2 T); arguments as the encoder's ``forward``.

        Sizes of chunks change nothing in a model that attends to everything, as all known ones do.
        """
        return self._encode(xs, _lengths(xs_lens, xs.size(1)))  # upstream's cast of the reference has made them floats

    @torch.inference_mode()
    def encode_all(self, calls: Sequence[Arguments]) -> list[tuple[Tensor, Tensor]]:
        """``encode`` for the arguments of several calls, in one batch."""
        each = [_bound(self.encode, call) for call in calls]
        lengths = [length for call in each for length in _lengths(call["xs_lens"], call["xs"].size(1))]
        states, masks = self._encode(stacked([call["xs"].transpose(1, 2) for call in each]).transpose(1, 2), lengths)
        sizes = [call["xs"].size(1) for call in each]
        ends = [states.size(1) // max(sizes) * size for size in sizes]
        return [(states[row : row + 1, :end], masks[row : row + 1, :, :end]) for row, end in enumerate(ends)]

    def _encode(self, xs: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        encoder, _ = self.prepared.current()
        with torch.autocast(xs.device.type, enabled=False):  # as in the solver, whatever surrounds the call
            states = encoder(xs, lengths).to(xs.dtype)
        rows, frames = states.shape[:2]
        valid = valid_frames([frames // xs.size(1) * length for length in lengths], frames, xs.device)
        return states, (torch.ones(rows, frames, dtype=torch.bool, device=xs.device) if valid is None else valid)[
            :, None
        ]

    @torch.inference_mode()
    def solve(
        self,
        x: Tensor,
        t_span: Tensor,
        mu: Tensor,
        mask: Tensor,
        spks: Tensor,
        cond: Tensor,
        meanflow: bool = False,
    ) -> Tensor:
        """Mel frames (B, 80, T); arguments as upstream's ``solve_euler`` and ``basic_euler``."""
        return self._solve(x, t_span, mu, _lengths(mask, mask.size(2)), spks, cond)

    @torch.inference_mode()
    def solve_all(self, calls: Sequence[Arguments]) -> list[Tensor]:
        """``solve`` for the arguments of several calls, in one batch for each number of steps."""
        each = [_bound(self.solve, call) for call in calls]
        alike: dict[int, list[int]] = {}  # upstream's times depend on that number alone
        for number, call in enumerate(each):
            alike.setdefault(len(call["t_span"]), []).append(number)
        results: dict[int, Tensor] = {}
        for numbers in alike.values():
            some = [each[number] for number in numbers]
            lengths = [call["x"].size(2) for call in some]
            x, mu, cond = (stacked([call[name] for call in some]) for name in ("x", "mu", "cond"))
            spks = torch.cat([call["spks"] for call in some])
            solved = self._solve(x, some[0]["t_span"], mu, lengths, spks, cond)
            for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
                results[number] = solved[row : row + 1, :, :length]
        return [results[number] for number in range(len(each))]

    def _solve(self, x: Tensor, times: Tensor, mu: Tensor, lengths: list[int], spks: Tensor, cond: Tensor) -> Tensor:
        s3gen, section = self._s3gen, self._section
        _, solver = self.prepared.current()
        mean_flow, times = flow_weights.is_mean_flow(s3gen), times.float()
        if section.steps is not None and not (mean_flow and section.steps >= len(times) - 1):
            times = schedule(section.steps, not mean_flow and s3gen.flow.decoder.t_scheduler == "cosine", x.device)
        return solver.solve(
            x,
            times,
            flow_weights.time_projections(s3gen, times),
            mu,
            spks,
            cond,
            lengths=lengths,
            guidance=None if mean_flow else float(s3gen.flow.decoder.inference_cfg_rate),
            guided_steps=section.guided_steps,
        )


def _release(engines: tuple[SpeechEncoder, FlowSolver]) -> None:
    for part in engines:
        part.release()


def _costs(section: FlowSection, mean_flow: bool) -> list[str]:
    """What each knob takes away, for the report; the figures are those of ``docs/benchmarks.md``."""
    costs = []
    if section.steps is not None:
        own = "at most the model's own, " if mean_flow else ""  # two, which it has been trained to take
        costs.append(f"{section.steps} Euler steps ({own}5 instead of 10: 21 dB SNR on mels)")
    if section.guided_steps is not None:
        costs.append(f"{section.guided_steps} steps guided (5 of 10: 13 dB)")
    if section.prompt_seconds is not None:
        costs.append(f"the last {section.prompt_seconds:g} s of the voice (samples cannot be compared)")
    return costs


def _lengths(given: Tensor, longest: int) -> list[int]:
    """Lengths (B,), or those of a mask (B, 1, T), on the host; the longest possible is ``longest``.

    On CUDA a single one is not waited for: upstream's own masks would fit no utterance that is padded by itself.
    """
    if given.is_cuda and len(given) == 1:
        return [longest]
    return (given if given.dim() == 1 else given.sum(dim=(1, 2))).long().tolist()


def _bound(function: Callable[..., Any], call: Arguments) -> dict[str, Any]:
    return inspect.signature(function).bind(*call[0], **call[1]).arguments
