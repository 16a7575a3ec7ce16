"""The watermark over the blocks of a stream: as over the whole, detected, at any length."""

from __future__ import annotations

import acoustic_tools
import numpy as np
import pytest
import soundfile
import torch
from acoustic_tools import TOKENS, together

from chatterbox_turbo import synthetic
from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.measure.streaming import seam
from chatterbox_turbo.runtime.voice.marking import AHEAD, GRID, REACH, MarkStream
from chatterbox_turbo.runtime.voice.reference_audio import resample

speaker = acoustic_tools.speaker


@pytest.fixture(scope="module")
def perth():
    import perth

    return perth.PerthImplicitWatermarker()


@pytest.fixture
def mark(perth):
    """Samples to marked ones, as the watermark pass has it done."""

    @torch.inference_mode()
    def apply(samples):
        return resample(perth.apply_watermark(resample(samples, 24000, 32000), sample_rate=32000), 32000, 24000)

    return apply


@pytest.fixture(scope="module")
def speech():
    samples = soundfile.read(synthetic.reference_voice(), dtype="float32")[0][24000 : 24000 * 5].copy()
    samples[:480] = 0  # as generate's
    return samples


@torch.inference_mode()
def confidence(perth, samples):
    return float(perth.get_watermark(samples, sample_rate=24000, round=False).mean())


def cut(samples, size):
    return [samples[at : at + size] for at in range(0, len(samples), size)]


@pytest.mark.parametrize("size", [1000, 9600, 30000, 10**6])
def test_marked_blocks_are_the_marked_whole(perth, mark, speech, size):
    got = list(MarkStream(mark).run(cut(speech, size)))
    out, whole = np.concatenate(got), mark(speech)
    assert (len(out) == len(speech) and len(got) > 1) or size == 10**6
    assert snr_db(torch.from_numpy(out), torch.from_numpy(whole)) > 60
    assert seam(torch.from_numpy(out), [len(block) for block in got]) < 1.5
    assert confidence(perth, out) > confidence(perth, whole) - 0.05 and confidence(perth, speech) < 0.5


def test_blocks_that_are_marked_alone_have_seams(mark):
    """In a tone, where nothing hides them."""
    tone = (0.3 * np.sin(2 * np.pi * 220 / 24000 * np.arange(48000))).astype(np.float32)
    alone = [mark(block) for block in cut(tone, 9600)]
    together = list(MarkStream(mark).run(cut(tone, 9600)))
    steps = [seam(torch.from_numpy(np.concatenate(some)), list(map(len, some))) for some in (alone, together)]
    assert steps[0] > 1.5 > steps[1]


def test_with_the_whole_reach_nothing_but_rounding_differs(mark, speech):
    out = np.concatenate(list(MarkStream(mark, REACH).run(cut(speech, 9600))))
    assert snr_db(torch.from_numpy(out[2400:]), torch.from_numpy(mark(speech)[2400:])) > 100


@pytest.mark.parametrize("seconds", [1.0, 1.04, 2.0])
def test_streams_of_a_second_are_detected(perth, mark, speech, seconds):
    samples = speech[: int(24000 * seconds)]
    out = np.concatenate(list(MarkStream(mark).run(cut(samples, 4800))))
    assert confidence(perth, out) > confidence(perth, mark(samples)) - 0.05


@pytest.mark.parametrize("n", [0, 1, 100, 959, 960, 24001, 24239])
def test_any_length_is_kept(mark, speech, n):
    out = list(MarkStream(mark).run(cut(speech[4800 : 4800 + n], 700)))
    assert sum(map(len, out)) == n and all(block.dtype == np.float32 for block in out)


def test_the_delay_is_what_is_said(mark, speech):
    stream = MarkStream(mark)
    assert not list(stream.push(speech[:AHEAD])) and list(stream.push(speech[AHEAD : AHEAD + GRID]))
    assert [len(block) for block in stream.push(speech[AHEAD + GRID : AHEAD + 5 * GRID])] == [4 * GRID]


def test_what_is_not_asked_for_comes_later(mark, speech):
    stream = MarkStream(mark)
    stream.push(speech[:24000])
    got = [*stream.push(speech[24000:40000]), *stream.finish()]
    assert sum(map(len, got)) == 40000


def test_marking_refuses(mark, speech):
    with pytest.raises(InvalidRequestError, match="multiple of 240"):
        MarkStream(mark, 1000)
    stream = MarkStream(mark)
    list(stream.finish())
    for call in (stream.finish, lambda: stream.push(speech)):
        with pytest.raises(InvalidRequestError, match="has ended"):
            call()
    with pytest.raises(InvalidRequestError, match="every whole spectrum"):
        list(MarkStream(lambda samples: samples[:-GRID]).run([speech]))


def test_an_abandoned_mark_holds_nothing(mark, speech):
    stream = MarkStream(mark)
    running = stream.run(cut(speech, 9600))
    next(running)
    running.close()
    assert not len(stream._samples)


def test_streamed_speech_is_marked(perth, mark, speaker):
    """Both halves together: tokens in, marked blocks out."""
    made = (block.numpy() for block in speaker.stream().run(TOKENS.split(5)))
    out = np.concatenate(list(MarkStream(mark).run(made)))
    whole = mark(together(speaker.stream(), TOKENS).numpy())
    assert len(out) == 960 * len(TOKENS) and confidence(perth, out) > confidence(perth, whole) - 0.05
