"""What the tests of a stream's acoustic half share: that half of a tiny model, speech tokens, windows.

A fixture is taken by name: ``speaker = acoustic_tools.speaker``.
"""

from __future__ import annotations

import pytest
import torch

from chatterbox_turbo.measure.streaming import given
from chatterbox_turbo.runtime.s3gen.streamed_vocoder import begin
from chatterbox_turbo.runtime.s3gen.streaming import AcousticStream, Windows
from chatterbox_turbo.runtime.s3gen.vocoder_network import Network
from chatterbox_turbo.upstream import vocoder_weights
from chatterbox_turbo.upstream.flow_windows import FlowWindows

SMALL = Windows(first_chunk=8, chunk=10, growth=1.5, longest_chunk=20, even=1, context=10, seen=0)
TOKENS = torch.randint(0, 6561, (45,), generator=torch.Generator().manual_seed(1))
HOST = torch.device("cpu")


class Acoustics:
    """The acoustic half of a tiny model with the random numbers of one utterance."""

    def __init__(self, model):
        self.s3gen = model.s3gen
        self.reference = model.conds.gen if hasattr(model, "conds") else model.ref_dict
        weights = vocoder_weights.read(self.s3gen.mel2wav, fold=False)
        self.engines = weights, Network(weights.network)
        self.windows = FlowWindows(self.s3gen, self.reference, self.noise(self.frames))

    @property
    def frames(self):
        return self.reference["prompt_feat"].shape[1]

    @staticmethod
    def noise(n, seed=5):
        return torch.randn(1, 80, n, generator=torch.Generator().manual_seed(seed))

    def vocoder(self):
        return begin(lambda: self.engines, HOST, 3)

    def stream(self, windows=SMALL, mels=None, **options):
        options.setdefault("fade", self.s3gen.trim_fade)
        return AcousticStream(mels or self.windows, self.vocoder(), given(self.noise(400)), windows, **options)

    def whole(self, tokens, **options):
        everything = Windows(first_chunk=10**6, longest_chunk=10**6, context=None, held=0, faded=0)
        return together(self.stream(everything, **options), tokens, 10**6)


def blocks(stream, tokens, size=7):
    return list(stream.run(tokens.split(size)))


def together(stream, tokens, size=7):
    return torch.cat(blocks(stream, tokens, size))


@pytest.fixture
def speaker(models):
    return Acoustics(models("vc"))
