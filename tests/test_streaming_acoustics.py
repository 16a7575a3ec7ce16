"""The acoustic half of a stream: windows of speech tokens to samples."""

from __future__ import annotations

import gc
import weakref

import acoustic_tools
import pytest
import torch
import torch.nn.functional as F
from acoustic_tools import HOST, SMALL, TOKENS, Acoustics, blocks, together

from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.measure.fidelity import snr_db
from chatterbox_turbo.measure.streaming import given, seam
from chatterbox_turbo.runtime.s3gen.drawn import seeded
from chatterbox_turbo.runtime.s3gen.streamed_vocoder import PITCH_REACH, SAMPLE_REACH, StreamedVocoder
from chatterbox_turbo.runtime.s3gen.streaming import AcousticStream, Windows
from chatterbox_turbo.runtime.s3gen.vocoder import pitch_of, random_phases
from chatterbox_turbo.upstream.flow_windows import FlowWindows

speaker = acoustic_tools.speaker
SILENCE = torch.tensor([4299] * 3)


@pytest.fixture(params=["vc", "turbo"])
def acoustics(models, request):
    return Acoustics(models(request.param))


@pytest.mark.parametrize("family", ["vc", "turbo"])
@torch.inference_mode()
def test_one_window_is_upstreams_inference(models, family):
    """The same random numbers, drawn in upstream's order: the same mel frames to the bit, and samples."""
    own = Acoustics(models(family))
    n, mean_flow = 20, family == "turbo"
    torch.manual_seed(0)
    expected, _ = own.s3gen.inference(TOKENS[None, :n], ref_dict=dict(own.reference))
    torch.manual_seed(0)
    first = torch.randn(1, 80, 2 * n) if mean_flow else None
    drawn = torch.randn(1, 80, own.frames + 2 * n)
    noise = first if mean_flow else drawn[..., own.frames :]
    mel = FlowWindows(own.s3gen, own.reference, drawn[..., : own.frames])(TOKENS[:n], 0, noise)
    weights, _ = own.engines
    phases = random_phases(weights.source, 1, HOST)
    samples = StreamedVocoder(lambda: own.engines, phases, given(torch.randn(1, 9, 960 * n)))(mel, 0)
    samples[:960] *= own.s3gen.trim_fade
    assert samples.shape == expected[0].shape and snr_db(samples, expected[0]) > 100


def test_the_reference_is_not_written_to(speaker):
    before = {name: value.clone() for name, value in speaker.reference.items() if torch.is_tensor(value)}
    together(speaker.stream(), TOKENS[:20])
    for name, value in before.items():
        assert torch.equal(speaker.reference[name], value) and speaker.reference[name].dtype == value.dtype


@pytest.mark.parametrize("n", [1, 2, 8, 18, 45])
@pytest.mark.parametrize("windows", [SMALL, Windows(), Windows(chunk=60, look_ahead=0)])
def test_as_many_samples_as_one_call_has(acoustics, windows, n):
    assert len(together(acoustics.stream(windows), TOKENS[:n])) == 960 * n


def test_the_smallest_windows(speaker):
    windows = Windows(1, 1, 1, 1, context=0, look_ahead=0, seen=0, held=0, faded=0)
    assert [len(block) for block in blocks(speaker.stream(windows), TOKENS[:5])] == [960] * 5


def test_how_tokens_arrive_changes_nothing(speaker):
    expected = together(speaker.stream(), TOKENS, 1)
    for size in (4, 45):
        assert torch.equal(together(speaker.stream(), TOKENS, size), expected)


def test_a_window_with_everything_is_one_call(acoustics):
    for windows in (Windows(first_chunk=45), Windows(first_chunk=20, seen=45, context=None)):
        given_ = together(acoustics.stream(windows), TOKENS, 45)
        assert snr_db(given_, acoustics.whole(TOKENS)) > 60


def test_first_blocks_come_before_the_last_tokens(speaker):
    stream = speaker.stream(Windows(first_chunk=8, chunk=10, look_ahead=3))
    assert not list(stream.push(TOKENS[:10]))
    first = list(stream.push(TOKENS[10:11]))
    assert [len(block) for block in first] == [480 * (2 * (8 + 3) - 12)]


@pytest.mark.parametrize("windows", [SMALL, Windows(), Windows(first_chunk=3, chunk=3, growth=1, seen=0)])
def test_equal_mel_frames_make_equal_samples(speaker, windows):
    """The vocoder's part: windows of one sequence of mel frames against all of it."""
    mel = speaker.windows(TOKENS, 0, speaker.noise(90))

    def same(tokens, first, noise):
        return mel[..., 2 * first : 2 * (first + len(tokens))]

    got = blocks(speaker.stream(windows, same), TOKENS)
    expected = speaker.whole(TOKENS, mels=same)
    assert snr_db(torch.cat(got), expected) > 60
    assert seam(torch.cat(got), [len(block) for block in got]) < 1.5
    # what the overlap and the source that goes on are there for
    hasty = Windows(windows.first_chunk, windows.chunk, windows.growth, windows.longest_chunk, held=0, faded=0, seen=0)
    assert snr_db(together(speaker.stream(hasty, same), TOKENS), expected) < 40


def test_a_jump_of_the_phase_is_a_seam():
    """The measure finds what it is for."""
    tone = torch.sin(2 * torch.pi * 220 / 24000 * torch.arange(9600))
    jumped = torch.cat([tone[:4800], tone[4850:]])
    assert seam(tone, [4800, 4800]) < 1.5 < seam(jumped, [4800, 4750])


@pytest.mark.parametrize("family", ["vc", "turbo"])
def test_streamed_speech_has_no_seams(models, family):
    own = Acoustics(models(family))
    got = blocks(own.stream(), TOKENS)
    assert len(got) > 3 and seam(torch.cat(got), [len(block) for block in got]) < 1.5


def test_what_is_rendered_twice_is_cross_faded():
    """Windows that say 1, 2, 3, ...: the sound goes from one to the next in four frames."""
    numbers = iter(range(1, 9))
    same = AcousticStream(
        lambda tokens, first, noise: noise,
        lambda mel, first, known: torch.full((480 * mel.size(2),), float(next(numbers))),
        given(torch.zeros(1, 80, 90)),
        Windows(15, 15, growth=1),
    )
    out = together(same, TOKENS)
    changes = out.diff().nonzero().flatten()
    assert out[0] == 1 and out[-1] == 3 and out.diff().min() >= 0
    assert out.diff().max() < 0.001 and len(changes) == 2 * (4 * 480 + 1)


@pytest.mark.parametrize("at", [0, 8, 30, 44])
def test_every_token_is_heard(speaker, at):
    changed = TOKENS.clone()
    changed[at] = (changed[at] + 3000) % 6561
    a, b = together(speaker.stream(), TOKENS), together(speaker.stream(), changed)
    late = max(960 * at, 480)  # upstream's first 20 ms are silent
    assert snr_db(a[late : 960 * (at + 1)], b[late : 960 * (at + 1)]) < 30


def test_the_tail_is_spoken_and_the_crop_is_cut(speaker):
    got = together(speaker.stream(tail=SILENCE), TOKENS)
    assert torch.equal(got, together(speaker.stream(), torch.cat([TOKENS, SILENCE])))
    cropped = together(speaker.stream(crop=960), TOKENS)
    assert torch.equal(cropped, together(speaker.stream(), TOKENS)[:-960])
    assert not len(blocks(speaker.stream(crop=960), TOKENS[:1]))
    with pytest.raises(InvalidRequestError, match="held of 2 or more"):
        speaker.stream(Windows(held=1, faded=0), crop=960)


def test_only_the_beginning_of_the_utterance_is_faded_in(speaker):
    plain, faded = (together(speaker.stream(fade=fade), TOKENS) for fade in (None, speaker.s3gen.trim_fade))
    assert torch.equal(plain[960:], faded[960:])
    assert torch.equal(plain[:960] * speaker.s3gen.trim_fade, faded[:960])


@pytest.mark.parametrize("extra", [1, 3])
@torch.inference_mode()
def test_a_prompt_that_is_longer_than_its_tokens(speaker, extra):
    """Upstream gives up as many frames at the beginning."""
    reference = dict(speaker.reference)
    reference["prompt_feat"] = F.pad(reference["prompt_feat"], (0, 0, 0, extra))
    windows = FlowWindows(speaker.s3gen, reference, speaker.noise(speaker.frames + extra))
    assert windows.skipped == extra
    torch.manual_seed(0)
    expected = speaker.s3gen.flow_inference(TOKENS[None, :20], ref_dict=reference, finalize=True)
    torch.manual_seed(0)
    drawn = torch.randn(1, 80, speaker.frames + 40)
    begun = speaker.frames
    windows = FlowWindows(speaker.s3gen, reference, F.pad(drawn[..., :begun], (0, extra)))
    mel = windows(TOKENS[:20], 0, drawn[..., begun:])
    assert snr_db(mel[..., extra:], expected) > 100
    assert len(together(speaker.stream(mels=windows, skipped=extra), TOKENS)) == 960 * 45 - 480 * extra


def test_reaches_are_those_of_the_convolutions(speaker):
    weights, _ = speaker.engines
    mel = 1.3 * speaker.noise(80)
    other = mel.clone()
    other[..., 40:] = 0
    moved = (pitch_of(weights, mel) != pitch_of(weights, other))[0].nonzero()[0].item()
    assert 40 - moved == PITCH_REACH
    # left of a window: its source is known, so that only the convolutions lack what is before it
    whole = speaker.vocoder()(mel, 0)
    vocoder = speaker.vocoder()
    vocoder(mel[..., :60], 0)
    part = vocoder(mel[..., 40 - SAMPLE_REACH :], 40 - SAMPLE_REACH, SAMPLE_REACH)
    assert snr_db(part[480 * SAMPLE_REACH :], whole[480 * 40 :]) > 100


def test_nothing_to_say(speaker):
    with pytest.raises(InvalidRequestError, match="no speech tokens"):
        list(speaker.stream().run([]))
    stream = speaker.stream()
    assert not list(stream.push(TOKENS[:0]))
    with pytest.raises(InvalidRequestError, match="no speech tokens"):
        stream.finish()
    assert len(together(speaker.stream(tail=SILENCE), TOKENS[:0])) == 960 * 3  # as Turbo's generate


def test_a_stream_is_for_one_utterance(speaker):
    stream = speaker.stream()
    together(stream, TOKENS[:5])
    for call in (stream.finish, lambda: stream.push(TOKENS)):
        with pytest.raises(InvalidRequestError, match="has ended"):
            call()
    with pytest.raises(InvalidRequestError, match="whole numbers"):
        speaker.stream().push(torch.zeros(3))


@pytest.mark.parametrize(
    "options",
    [
        {"first_chunk": 0},
        {"chunk": 0},
        {"chunk": True},
        {"chunk": 2.5},
        {"longest_chunk": -1},
        {"context": -1},
        {"look_ahead": -1},
        {"growth": 0.5},
        {"growth": float("nan")},
        {"growth": "2"},
        {"even": 0},
        {"held": 3, "faded": 4},
    ],
)
def test_windows_that_make_no_sense_are_refused(options):
    with pytest.raises(InvalidRequestError):
        Windows(**options)


def test_chunks_grow():
    windows = Windows(first_chunk=5, chunk=25, growth=2, longest_chunk=80, even=1)
    assert [windows.size(number) for number in range(5)] == [5, 25, 50, 80, 80]
    assert [Windows().size(number) for number in range(10)] == [24, 40, 40, 40, 50, 62, 77, 96, 100, 100]
    assert Windows(chunk=200, longest_chunk=100).size(3) == 200  # what was asked for is no less


def test_a_consumer_may_stop_anywhere(speaker):
    for count in range(1, 4):
        mels = _Mels(speaker.windows)
        stream = speaker.stream(mels=mels)
        running = stream.run(TOKENS.split(7))
        for _ in range(count):
            next(running)
        running.close()
        assert stream._frames is None and stream._rest is None and not len(stream._tokens)
        held = weakref.ref(mels)
        del stream, running, mels
        gc.collect()
        assert held() is None


class _Mels:
    """Mel frames, after ``failures`` errors."""

    def __init__(self, windows, failures=0):
        self.windows, self.failures = windows, failures

    def __call__(self, *arguments):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("out of memory")
        return self.windows(*arguments)


def test_after_an_error_a_stream_goes_on(speaker):
    mels = _Mels(speaker.windows)
    stream, got = speaker.stream(mels=mels), []
    got += stream.push(TOKENS[:30])
    mels.failures = 1
    with pytest.raises(RuntimeError):
        list(stream.push(TOKENS[30:]))
    got += stream.push(TOKENS[:0])
    got += stream.finish()
    assert torch.equal(torch.cat(got), together(speaker.stream(), TOKENS))


def test_numbers_are_drawn_once_and_in_order():
    expected = seeded(2, 10, HOST, 4).between(0, 95)
    drawn = seeded(2, 10, HOST, 4)
    assert torch.equal(drawn.between(0, 31), expected[..., :31])
    drawn.forget(20)
    assert torch.equal(drawn.between(25, 95), expected[..., 25:])
    with pytest.raises(ValueError, match="forgotten"):
        drawn.between(19, 30)
