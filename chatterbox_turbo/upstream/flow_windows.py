"""Mel frames of windows of an utterance's speech tokens, the reference before each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import flow_inputs
from .flow_inputs import FRAMES_PER_TOKEN


class FlowWindows:
    """Speech tokens to mel frames for one utterance; nothing of the reference is written to.

    Encoder and solver are called by their names on the model, so that whatever is in their place computes.

    Args:
        s3gen: upstream's ``S3Gen``.
        reference: what its ``embed_ref`` returns, of one voice.
        noise: (1, 80, P) fp32 of the reference's frames, drawn once an utterance; ``None``: from torch's generator.
        prompt_tokens: use the last ones of the reference only (``flow.prompt_seconds``).
        steps: Euler steps; ``None``: the model's own number.

    Attributes:
        frames: P, the reference's mel frames.
        skipped: mel frames by which the reference is longer than its tokens; upstream's ``inference`` gives them up at
            the beginning of the speech, and so should whoever wants its length.
    """

    def __init__(
        self,
        s3gen: nn.Module,
        reference: Mapping[str, Any],
        noise: Tensor | None = None,
        prompt_tokens: int | None = None,
        steps: int | None = None,
    ):
        self._s3gen, self._reference, self._steps = s3gen, dict(reference), steps
        tokens = torch.atleast_2d(torch.as_tensor(reference["prompt_token"]))
        mel = torch.as_tensor(reference["prompt_feat"])
        if prompt_tokens is not None:  # the end of the prompt: speech goes on from there
            tokens, mel = tokens[:, -prompt_tokens:], mel[:, -prompt_tokens * FRAMES_PER_TOKEN :]
            self._reference |= {"prompt_token": tokens, "prompt_feat": mel}
        self._begin, self.frames = FRAMES_PER_TOKEN * tokens.size(1), mel.size(1)
        self.skipped = self.frames - self._begin
        self._noise = torch.randn(1, mel.size(2), self.frames, device=s3gen.device) if noise is None else noise

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, first: int, noise: Tensor) -> Tensor:
        """Mel frames (1, 80, 2 n) fp32 of speech tokens (n,) int64 from number ``first`` of the utterance on.

        In the first window ``skipped`` frames at the beginning mean nothing.

        Args:
            noise: (1, 80, 2 n) fp32.
        """
        inputs, begin = flow_inputs.read(self._s3gen, tokens, self._reference), self._begin
        if first:  # the frames that upstream gives up are of the first window alone
            inputs = replace(inputs, prompt=inputs.prompt[:, :begin])
        state = torch.cat([self._noise[..., :begin].to(inputs.speaker), noise.to(inputs.speaker)], dim=2)
        return flow_inputs.solve(self._s3gen, inputs, state, self._steps)[..., begin:]
