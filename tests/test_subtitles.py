"""Times of sentences and words, as SubRip and WebVTT."""

from __future__ import annotations

from itertools import pairwise

import pytest

from chatterbox_turbo.speech.subtitles import cues, written_as
from chatterbox_turbo.speech.times import Sentence, Word

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
    lines = [Sentence("One & <two>.", 0.0, 1.5), Sentence("Three.", 3661.25, 3662.0)]
    assert written_as(lines, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne & <two>.\n\n2\n01:01:01,250 --> 01:01:02,000\nThree.\n"
    )
    assert written_as(lines, "vtt") == (
        "WEBVTT\n\n1\n00:00:00.000 --> 00:00:01.500\nOne &amp; &lt;two>.\n\n2\n01:01:01.250 --> 01:01:02.000\nThree.\n"
    )
    assert written_as([], "vtt") == "WEBVTT\n"


def test_words_are_cues_in_one_format_and_marks_in_the_other():
    """Marks grow, and lie inside their cue."""
    times = [("A", 0.1, 0.2), ("b&c", 0.5, 0.6), ("d", 0.5, 0.6), ("<e>.", 0.9, 1.25)]
    words = tuple(Word(text, start, end, "alignment") for text, start, end in times)
    lines = [Sentence("A b&c d <e>.", 0.1, 1.25, "alignment", words), Sentence("No.", 2.0, 3.0)]
    assert written_as(lines, "vtt", words=True) == (
        "WEBVTT\n\n1\n00:00:00.100 --> 00:00:01.250\nA <00:00:00.500>b&amp;c d <00:00:00.900>&lt;e>.\n\n"
        "2\n00:00:02.000 --> 00:00:03.000\nNo.\n"
    )
    blocks = written_as(lines, "srt", words=True).split("\n\n")
    assert len(blocks) == 5 and blocks[1] == "2\n00:00:00,500 --> 00:00:00,600\nb&c"
    assert written_as(lines, "srt").split("\n\n")[0] == "1\n00:00:00,100 --> 00:00:01,250\nA b&c d <e>."
    late = Sentence("A b.", 0.1, 0.2, "alignment", (Word("A", 0.1, 0.2, "alignment"), Word("b.", 0.2, 0.2, "estimate")))
    assert "\nA b.\n" in written_as([late], "vtt", words=True)  # a word that was never spoken
