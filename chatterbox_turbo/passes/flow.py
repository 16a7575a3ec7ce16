"""Flow matching by this package's own solver in place of upstream's two Euler loops.

Replaces ``solve_euler`` (guided) and ``basic_euler`` (mean flow) of upstream's ``models/s3gen/flow_matching.py`` and,
inside them, the estimator's ``forward``. The noise is still drawn by upstream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import FlowSection
from ..errors import UnsupportedModelError
from ..runtime.flow_estimator import velocity
from ..runtime.flow_solver import FlowSolver, schedule
from ..runtime.graphs import compiled
from ..runtime.host_memory import keep_freed_blocks
from ..upstream import flow_weights
from .base import Context, Pass

TOKENS_PER_SECOND, FRAMES_PER_TOKEN = 25, 2


class FlowPass(Pass):
    """Solves with what does not change between steps computed once, and without masks where nothing is padded."""

    name = "flow"
    summary = "flow matching: constant parts once, no masks, buffers kept; optionally fewer steps"
    replaces = (
        "s3gen.flow.decoder.solve_euler",
        "s3gen.flow.decoder.basic_euler",
        "s3gen.flow.decoder.estimator.forward",
    )
    patch_points = (*replaces, "s3gen.flow_inference")

    def check(self, context: Context) -> str:
        section, s3gen = context.config.flow, context.parts.s3gen
        try:
            flow_weights.check(s3gen)
        except (UnsupportedModelError, AttributeError) as error:
            return str(error)
        if section.guided_steps is not None and flow_weights.is_mean_flow(s3gen):
            return "flow.guided_steps is set, but the model works without guidance"
        return ""

    def apply(self, context: Context) -> str:
        section, s3gen, journal = context.config.flow, context.parts.s3gen, context.journal
        flow_weights.fuse(s3gen, journal)
        flow = Flow(s3gen, section)
        journal.record("buffers of the flow solver", flow.release)
        remark = flow.prepare()
        name = "basic_euler" if flow_weights.is_mean_flow(s3gen) else "solve_euler"
        journal.wrap(s3gen.flow.decoder, name, lambda wrapped, instance, args, kwargs: flow.solve(*args, **kwargs))
        journal.wrap(
            s3gen, "flow_inference", lambda wrapped, instance, args, kwargs: wrapped(*args, **flow.own(kwargs))
        )
        return remark


class Flow:
    """Noise to mel frames in upstream's terms."""

    def __init__(self, s3gen: nn.Module, section: FlowSection):
        self._s3gen, self._section = s3gen, section
        self._solver: FlowSolver | None = None
        self._addresses: Any = None

    def prepare(self) -> str:
        """Read the weights as they are now; the remark for the report."""
        s3gen, remarks = self._s3gen, []
        with torch.inference_mode(False), torch.no_grad():  # parameters outlive the call
            weights = flow_weights.read(s3gen)
        cuda, function = weights.device.type == "cuda", velocity
        if self._section.compile:
            function, reason = compiled(velocity, device=weights.device, dynamic=not cuda)
            remarks.append(f"not compiled: {reason}" if reason else "compiled")
        graphs = self._section.graphs and cuda
        if graphs:
            remarks.append("CUDA graphs")
        self.release()
        keep_freed_blocks()
        self._addresses = flow_weights.addresses(s3gen)
        self._solver = FlowSolver(weights, not graphs, function, lambda: self._addresses)
        return ", ".join([str(weights.dtype).removeprefix("torch."), *remarks])

    def release(self) -> None:
        """Give the memory of the solver back."""
        if self._solver is not None:
            self._solver.release()
        self._solver = None

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
        s3gen, section = self._s3gen, self._section
        if flow_weights.addresses(s3gen) != self._addresses:  # somebody moved or cast the weights after apply
            self.prepare()
        mean_flow = flow_weights.is_mean_flow(s3gen)
        times = t_span.float()
        if section.steps is not None:
            times = schedule(section.steps, not mean_flow and s3gen.flow.decoder.t_scheduler == "cosine", x.device)
        return self._solver.solve(
            x,
            times,
            flow_weights.time_projections(s3gen, times),
            mu,
            spks,
            cond,
            lengths=mask.sum(dim=(1, 2)).long().tolist(),
            guidance=None if mean_flow else float(s3gen.flow.decoder.inference_cfg_rate),
            guided_steps=section.guided_steps,
        )
