"""From speech tokens and a reference to what encoder and solver of flow matching are given, and back to mel frames.

What upstream computes between ``s3gen.flow_inference`` and the two (``S3Token2Mel.forward``, ``flow.inference`` and the
decoder's ``forward``), for one utterance, so that several can meet at encoder and solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patching import Journal
from ..runtime.device.devices import on_device
from .families import Parts
from .flow_weights import is_mean_flow
from .patch_points import first_problem

POINTS = ("s3gen.flow_inference", "s3gen.flow.inference", "s3gen.flow.decoder.forward")
FRAMES_PER_TOKEN = 2
TOKEN_SAMPLES = 960
OWN_STEPS, MEAN_FLOW_STEPS = 10, 2  # of flow_inference, where nobody asks for another number


def why_not(parts: Parts, journal: Journal) -> str:
    """Why what lies between the two is not known; empty where it is."""
    return first_problem(parts, POINTS, journal)


@dataclass(frozen=True)
class FlowInputs:
    """One utterance, with its reference before it.

    Attributes:
        embedded: (1, P + n, D), P tokens of the reference and n of the utterance, for the encoder.
        length: (1,) int64, P + n.
        speaker: (1, 80).
        prompt: (1, F, 80), mel frames of the reference.
        count: n.
    """

    embedded: Tensor
    length: Tensor
    speaker: Tensor
    prompt: Tensor
    count: int

    @property
    def frames(self) -> int:
        """Of reference and utterance."""
        return FRAMES_PER_TOKEN * self.embedded.size(1)


@torch.inference_mode()
def read(s3gen: nn.Module, tokens: Tensor, reference: dict[str, Any]) -> FlowInputs:
    """The inputs of speech tokens (n,) or (1, n) in the voice of a reference, which is not written to.

    Token ids stay integers, which upstream casts to the flow's format.
    """
    flow = s3gen.flow
    device, dtype = flow.input_embedding.weight.device, flow.input_embedding.weight.dtype

    def given(name: str) -> Tensor:
        value = torch.as_tensor(reference[name]).to(device)
        return value.to(dtype) if value.is_floating_point() and name != "prompt_token_len" else value

    tokens = torch.atleast_2d(tokens).to(device)
    prompt = torch.atleast_2d(given("prompt_token"))
    every = torch.cat([prompt.long(), tokens.long()], dim=1)
    speaker = flow.spk_embed_affine_layer(F.normalize(torch.atleast_2d(given("embedding")), dim=1))
    features = given("prompt_feat")
    features = features[None] if features.dim() == 2 else features
    length = torch.tensor([every.size(1)])
    return FlowInputs(flow.input_embedding(every), length, speaker, features, tokens.size(1))


def draw(s3gen: nn.Module, inputs: FlowInputs) -> Tensor:
    """The noise (1, 80, frames) that upstream begins with, drawn as it draws it.

    Releases up to 0.1.5 take the beginning of one noise that the model has carried since it was built.
    """
    flow, like = s3gen.flow, inputs.speaker
    kept = getattr(flow.decoder, "rand_noise", None)
    if kept is not None:
        return kept[:, :, : inputs.frames].to(like)
    own = None
    if is_mean_flow(s3gen):  # of the utterance alone, before the other one and in its place
        own = torch.randn(1, 80, FRAMES_PER_TOKEN * inputs.count, dtype=like.dtype, device=like.device)
    noise = torch.randn(1, 80, inputs.frames, dtype=like.dtype, device=like.device)
    if own is not None:
        noise[..., inputs.frames - own.size(2) :] = own
    return noise


@torch.inference_mode()
def solver_call(
    s3gen: nn.Module, inputs: FlowInputs, states: Tensor, mask: Tensor, noise: Tensor, steps: int | None
) -> dict[str, Tensor]:
    """The arguments of the solver for hidden states (1, frames, D) and their mask (1, 1, frames) of the encoder."""
    flow = s3gen.flow
    mean = flow.encoder_proj(states).transpose(1, 2).contiguous()
    condition = torch.zeros_like(mean)
    condition[:, :, : inputs.prompt.size(1)] = inputs.prompt.transpose(1, 2).to(mean.dtype)
    steps = steps or (MEAN_FLOW_STEPS if is_mean_flow(s3gen) else OWN_STEPS)
    times = torch.linspace(0, 1, steps + 1, device=mean.device, dtype=mean.dtype)
    if not is_mean_flow(s3gen) and flow.decoder.t_scheduler == "cosine":
        times = 1 - torch.cos(times * 0.5 * torch.pi)
    return {
        "x": noise,
        "t_span": times,
        "mu": mean,
        "mask": mask.to(mean),
        "spks": inputs.speaker,
        "cond": condition,
    }


def utterance(inputs: FlowInputs, frames: Tensor) -> Tensor:
    """Mel frames (1, 80, 2 n) of the utterance, of those (1, 80, frames) with the reference before it."""
    return frames[:, :, inputs.prompt.size(1) :]


@torch.inference_mode()
def solve(s3gen: nn.Module, inputs: FlowInputs, noise: Tensor, steps: int | None) -> Tensor:
    """Mel frames (1, 80, frames), reference included, by upstream's own functions, whoever is behind them."""
    flow, name = s3gen.flow, "basic_euler" if is_mean_flow(s3gen) else "solve_euler"
    states, mask = flow.encoder(inputs.embedded, on_device(inputs.length, inputs.embedded.device))
    return getattr(flow.decoder, name)(**solver_call(s3gen, inputs, states, mask, noise, steps))
