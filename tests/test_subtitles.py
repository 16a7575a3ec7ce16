"""Times of sentences, as SubRip and WebVTT."""

from __future__ import annotations

from itertools import pairwise

import pytest

from chatterbox_turbo.speech.subtitles import Cue, cues, written_as

RATE = 24_000
PIECES = [
    {"text": "The quick brown fox jumps over the lazy dog. Is it two, or three?", "samples": 5 * RATE, "pause": 0.5},
    {"text": "No.", "samples": RATE, "pause": 0.0},
]


def test_sentences_follow_each_other_and_leave_the_pauses_out():
    found = list(cues(PIECES, RATE, "en"))
    assert [cue.text for cue in found] == [
        "The quick brown fox jumps over the lazy dog.", "Is it two, or three?", "No."]  # fmt: skip
    assert found[0].start == 0.0 and found[0].end == found[1].start
    assert 2.0 < found[0].end < 3.8 and found[1].end == pytest.approx(4.5)
    assert (found[2].start, found[2].end) == (5.0, 6.0)


def test_a_long_sentence_has_several_lines():
    text = "and so on, " * 40
    found = list(cues([{"text": text, "samples": 30 * RATE, "pause": 0.0}], RATE, "en"))
    assert len(found) > 3 and found[-1].end == pytest.approx(30.0)
    assert all(one.end == after.start for one, after in pairwise(found))
    assert "".join(cue.text.replace(" ", "") for cue in found).startswith("andsoon,andsoon")


def test_both_formats():
    lines = [Cue(0.0, 1.5, "One & <two>."), Cue(3661.25, 3662.0, "Three.")]
    assert written_as(lines, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne & <two>.\n\n2\n01:01:01,250 --> 01:01:02,000\nThree.\n"
    )
    assert written_as(lines, "vtt") == (
        "WEBVTT\n\n1\n00:00:00.000 --> 00:00:01.500\nOne &amp; &lt;two>.\n\n2\n01:01:01.250 --> 01:01:02.000\nThree.\n"
    )
    assert written_as([], "vtt") == "WEBVTT\n"
