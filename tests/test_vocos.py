"""Vocos as the vocoder: the package's samples, batches, lengths of graphs, and how many mel frames it sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import vocos_tools
from vocos_tools import LIMIT, SMALL, frames, loud

from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.measure.streaming import given
from chatterbox_turbo.runtime.s3gen.graphed import bucketed
from chatterbox_turbo.runtime.s3gen.streaming import AcousticStream, Windows
from chatterbox_turbo.runtime.s3gen.vocos_network import VocosArchitecture
from chatterbox_turbo.runtime.s3gen.vocos_vocoder import StreamedVocos, VocosDecoder, coefficients, samples_of

network = vocos_tools.network


# --- what it computes


@pytest.mark.parametrize("n_fft", [1920, 1600, 960])
@torch.inference_mode()
def test_samples_are_those_of_the_packages_own_layers(n_fft):
    own = loud(replace(SMALL, n_fft=n_fft))
    for rows, count in ((1, 1), (2, 9)):
        mel = 3 * frames(count, rows=rows)
        expected = own(mel)
        found = VocosDecoder(own, 1e9).synthesize(mel)
        assert found.shape == expected.shape == (rows, 480 * count)
        assert expected.std() > 1e-3 and snr_db(found, expected) > 100
        assert VocosDecoder(own, 1e-3).synthesize(mel).abs().max() == 1e-3


@torch.inference_mode()
def test_a_batch_gives_each_what_it_gets_alone(network, monkeypatch):
    decoder, mels = VocosDecoder(network, LIMIT), [frames(count, count) for count in (5, 12, 9)]
    alone = [decoder.synthesize(mel) for mel in mels]
    for found, expected in zip(decoder.synthesize_all(mels), alone, strict=True):
        assert found.shape == expected.shape and snr_db(found, expected) > 100
    unmasked = VocosDecoder(network, LIMIT, function=lambda network, mel, valid: coefficients(network, mel))
    assert snr_db(unmasked.synthesize_all(mels)[0], alone[0]) < 60


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
@torch.inference_mode()
def test_lengths_that_a_graph_pads_give_the_same(network, count):
    plain, padding = VocosDecoder(network, LIMIT), VocosDecoder(network, LIMIT)
    padding.longest, padding.pays_after = VocosDecoder.longest, 0
    mel = frames(count)
    assert snr_db(padding.synthesize(mel), plain.synthesize(mel)) > 100
    assert padding.runner.captured == [(bucketed(count), 1, True)]


def test_it_is_compiled_in_one_piece_for_all_lengths(network):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()  # after some compilations of one function it would give up
    counter = CompileCounter()
    traced = torch.compile(coefficients, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for count in (20, 33, 7):
            assert snr_db(traced(network, frames(count)), coefficients(network, frames(count))) > 100
    assert counter.frame_count == 1


# --- how far it sees


def depends(architecture):
    """Mel frames before and behind that the samples of a frame depend on, found by changing one frame."""
    network, count = loud(architecture).double(), 2 * architecture.reach + 9
    middle = count // 2
    mel = frames(count).double()
    changed = mel.clone()
    changed[:, :, middle] += 5
    with torch.no_grad():
        before, after = (samples_of(network, coefficients(network, each), 1e9)[0] for each in (mel, changed))
    moved = (before != after).view(count, -1).any(dim=1).nonzero().flatten() - middle
    return -moved.min().item(), moved.max().item()


@pytest.mark.parametrize(
    ("size", "frames_seen"),
    [
        ({"layers": 1}, 8),
        ({"layers": 8, "dim": 16}, 29),  # as many as the full size: width changes nothing
        ({"layers": 2, "n_fft": 960}, 10),
    ],
)
def test_the_receptive_field_is_what_the_architecture_says(size, frames_seen):
    architecture = replace(SMALL, **size)
    assert depends(architecture) == (frames_seen, frames_seen) == (architecture.reach,) * 2
    assert VocosArchitecture().reach == 29


def streamed(network, windows, tokens=60):
    """Samples of an utterance by windows, and of the whole, from the same mel frames."""
    mel, decoder = frames(2 * tokens, 3), VocosDecoder(network, LIMIT)
    options = {"reach": network.architecture.reach}
    stream = AcousticStream(
        lambda tokens, first, noise: noise, StreamedVocos(lambda: decoder), given(mel), windows, **options
    )
    with torch.inference_mode():
        return torch.cat(list(stream.run(torch.zeros(tokens, dtype=torch.int64).split(7)))), decoder.synthesize(mel)[0]


def test_a_stream_that_holds_back_what_it_reaches_gives_the_whole(network):
    reach = network.architecture.reach
    for first in (15, 4):
        found, whole = streamed(network, Windows(first_chunk=first, held=reach, faded=0))
        assert found.shape == whole.shape and snr_db(found, whole) > 100
    less = streamed(network, Windows(held=4))
    assert snr_db(*less) < 60, "the reach is not needed"
