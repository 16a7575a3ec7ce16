"""What is trained on: folders of recordings, parts of them, and what is said of those that are of no use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from training_tools import MEL, SETTINGS, mel_function, run, source, voiced, write_recordings

from chatterbox_turbo.errors import TrainingError
from chatterbox_turbo.training import recordings
from chatterbox_turbo.training.recordings import Recordings, Unusable, find
from chatterbox_turbo.training.segments import Batch, Batches, RecordedSegments, batches, chosen


def segments(folder, count=4800, held=12000, seed=0):
    return RecordedSegments(find(folder), seed, count, 24000, 480, held)


def test_mel_frames_are_upstreams_own():
    from chatterbox.models.s3gen.utils.mel import mel_spectrogram

    from chatterbox_turbo.upstream.mel_function import mel_function as upstreams

    function, description = upstreams()
    assert function is mel_spectrogram and description == MEL
    samples = torch.from_numpy(voiced(0.2))[None]
    assert function(samples).shape == (1, 80, 10)
    torch.testing.assert_close(mel_function()(samples), function(samples), rtol=0, atol=1e-3)


def test_ten_thousand_files_are_found_without_opening_one(tmp_path, monkeypatch):
    for number in range(100):
        (tmp_path / f"{number:03d}").mkdir()
        for other in range(100):
            (tmp_path / f"{number:03d}" / f"{other}.flac").touch()
    monkeypatch.setattr(soundfile, "SoundFile", None)
    began = time.process_time()
    found = find(tmp_path)
    assert len(found.names) == 10_000 and list(found.names) == sorted(found.names)
    assert time.process_time() - began < 2
    segments(tmp_path)


def test_what_soundfile_reads_is_found_and_nothing_else(tmp_path):
    for name in ("a.WAV", "b.mp3", "sub/c.ogg", "d.opus", "e.txt", "f.m4a", "g.raw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find(tmp_path).names == ("a.WAV", "b.mp3", "d.opus", "sub/c.ogg")


@pytest.mark.parametrize("names, why", [([], "It is empty"), (["notes.txt", "a.m4a"], "Its files are .m4a, .txt")])
def test_a_folder_without_recordings(tmp_path, names, why):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(TrainingError, match=f"no recordings in.*{why}"):
        find(tmp_path)
    with pytest.raises(TrainingError, match="no folder"):
        find(tmp_path / "missing")


def test_files_of_no_use_are_left_out_with_the_reason(tmp_path):
    write_recordings(tmp_path, 2)
    soundfile.write(tmp_path / "low.wav", voiced(1, 8000), 8000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 24000)
    soundfile.write(tmp_path / "silent.flac", np.zeros(24000, np.float32), 24000)
    soundfile.write(tmp_path / "nan.wav", np.full(24000, np.nan, np.float32), 24000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no audio at all")
    told = {}
    every = segments(tmp_path)
    for number in range(40):
        segment = every.segment(number)
        assert segment.name in ("0.wav", "1.wav")
        told |= segment.left_out
    expected = {"low": "8000 Hz", "empty": "no samples", "silent": "silent at 4 places", "nan": "not finite",
                "text": "cannot be decoded"}  # fmt: skip
    seen = {name.split(".")[0]: reason for name, reason in told.items()}
    assert {name for name in expected if name in seen} >= set(expected) - {
        name.split(".")[0] for name in every._validated
    }
    for name, reason in seen.items():
        assert expected[name] in reason
    notes = []
    run(tmp_path, tmp_path / "run", SETTINGS, note=notes.append)
    assert any("left out: " in note and "8000 Hz" in note for note in notes)


def test_nothing_but_files_of_no_use(tmp_path):
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(24000, np.float32), 24000)
    with pytest.raises(TrainingError, match=r"No recording in .* can be trained on.*silent.*and so on.*16 kHz"):
        source(tmp_path).held_out()
    with pytest.raises(TrainingError, match="can be trained on"):
        source(tmp_path).segment(0)
    with pytest.raises(TrainingError, match="can be trained on"):
        run(tmp_path, tmp_path / "run")


def test_a_file_that_is_gone_ends_the_run(tmp_path):
    every = segments(write_recordings(tmp_path, 2))
    (tmp_path / every.names[0]).unlink()
    with pytest.raises(TrainingError, match=r"is gone.*Put it back"):
        every.segment(0)


def test_stereo_is_averaged_and_other_rates_are_resampled(tmp_path):
    wave = voiced(1.0, 48000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([wave, np.zeros_like(wave)], axis=1), 48000, subtype="FLOAT")
    found = find(tmp_path).read("stereo.wav", 0.5, 4800, 24000)
    assert found.shape == (4800,) and found.dtype == np.float32
    # the same place by the whole file resampled, but for the filter's ends
    import soxr

    whole = soxr.resample(0.5 * wave, 48000, 24000, quality="soxr_hq")
    start = int(0.5 * (48000 - 9600 + 1)) / 2
    best = max(
        10 * np.log10(np.sum(whole[a : a + 4000] ** 2) / np.sum((whole[a : a + 4000] - found[400:4400]) ** 2))
        for a in range(int(start) + 398, int(start) + 403)
    )
    assert best > 40


def test_ten_hours_are_read_where_they_are_needed(tmp_path):
    path, rate, seconds = tmp_path / "long.wav", 24000, 36000
    piece = (20000 * voiced(0.5)).astype("<i2")
    soundfile.write(path, piece, rate, subtype="PCM_16")
    with open(path, "r+b") as file:  # a sparse file: the rest of it are zeros that take no room
        size = 2 * rate * seconds
        file.seek(4)
        file.write((36 + size).to_bytes(4, "little"))
        file.seek(40)
        file.write(size.to_bytes(4, "little"))
        file.truncate(44 + size)
    found = Recordings(tmp_path, ("long.wav",))
    tracemalloc.start()
    began = time.process_time()
    first, last = found.read("long.wav", 0.0, 12000, rate), found.read("long.wav", 0.999999, 12000, rate)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(first).max() > 0.1 and np.abs(last).max() == 0 and len(last) == 12000
    assert peak < 2**20 and time.process_time() - began < 1


def test_segments_are_functions_of_seed_and_number(tmp_path):
    write_recordings(tmp_path, 5)
    first, again, other = segments(tmp_path), segments(tmp_path), segments(tmp_path, seed=1)
    ours = [first.segment(number).samples for number in range(8)]
    theirs = [again.segment(number).samples for number in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not all(torch.equal(a, other.segment(n).samples) for n, a in enumerate(ours))
    assert {len(samples) for samples in ours} == {4800}
    peaks = [20 * np.log10(float(samples.abs().max())) for samples in ours]
    assert all(-6.01 < peak < -0.99 for peak in peaks) and max(peaks) - min(peaks) > 1
    # every file once an epoch, and none of those that are validated on
    names = Counter(first.segment(number).name for number in range(8))
    assert set(names.values()) == {2} and len(names) == 4
    held = first.held_out()
    assert len(held) == 1 and held[0].name not in names and len(held[0].samples) == 12000
    assert torch.equal(held[0].samples, again.held_out()[0].samples)


def test_processes_share_a_batch(tmp_path):
    every = segments(write_recordings(tmp_path, 4))
    whole, parts = Batches(every, 4)[3], [Batches(every, 4, process, 2)[3] for process in range(2)]
    shared = torch.stack([parts[row % 2].samples[row // 2] for row in range(4)])
    assert torch.equal(whole.samples, shared)


def test_what_is_short_is_followed_by_silence_and_what_is_quiet_stays_quiet(tmp_path):
    soundfile.write(tmp_path / "short.wav", voiced(0.1), 24000, subtype="FLOAT")
    samples = segments(tmp_path, count=9600).segment(0).samples
    assert len(samples) == 9600 and samples[2400:].abs().max() == 0 < samples[:2400].abs().max()
    (tmp_path / "short.wav").unlink()
    soundfile.write(tmp_path / "quiet.wav", 0.01 * voiced(0.5), 24000, subtype="FLOAT")
    own = 0.01 * np.abs(voiced(0.5)).max()
    assert float(segments(tmp_path).segment(0).samples.abs().max()) <= 10.001 * own


def test_recordings_that_are_chosen_for_an_evaluation(tmp_path):
    write_recordings(tmp_path, 3)
    soundfile.write(tmp_path / "silent.wav", np.zeros(24000, np.float32), 24000)
    samples, left_out = chosen(find(tmp_path), 16, 7000, 24000, 480)
    assert [len(each) for each in samples] == [6720] * 3 and left_out.keys() <= {"silent.wav"}
    assert len(chosen(find(tmp_path), 2, 7000, 24000, 480)[0]) == 2


class Slow:
    """A dataset whose batches are waited for."""

    def __getitem__(self, step: int) -> Batch:
        time.sleep(0.5)
        return Batch(torch.full((1, 1), float(step)), None, ("",), {})


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_to_the_whole_group(how):
    """What terminals and process managers send reaches them too, and the step that is to be the last waits for them."""
    found = batches(Slow(), 0, 4, 2)
    assert next(found).samples == 0
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, how)
    assert [int(batch.samples) for batch in found] == [1, 2, 3]


def test_a_loader_draws_no_random_numbers(tmp_path):
    every = segments(write_recordings(tmp_path, 2))
    before = torch.get_rng_state()
    found = list(batches(Batches(every, 2), 3, 5, 0))
    assert len(found) == 2 and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0].samples, Batches(every, 2)[3].samples)


def test_a_rate_that_is_too_low_is_told(tmp_path):
    soundfile.write(tmp_path / "low.wav", voiced(1, 8000), 8000)
    with pytest.raises(Unusable, match=str(recordings.LOWEST_RATE)):
        find(tmp_path).read("low.wav", 0, 100, 24000)
