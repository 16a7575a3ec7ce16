"""Times of words and sentences: alone, in batches, in readings; from attention that is upstream's."""

from __future__ import annotations

import copy
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import NO_ANALYZER, has_analyzer
from cli_tools import error

import chatterbox_turbo as turbo
from chatterbox_turbo import synthetic
from chatterbox_turbo.cli import main
from chatterbox_turbo.errors import InvalidRequestError, UnavailablePassError
from chatterbox_turbo.runtime.t3.alignment_path import boundaries
from chatterbox_turbo.speech import long_text, reading
from chatterbox_turbo.speech.times import times_of
from chatterbox_turbo.text.words import words
from chatterbox_turbo.upstream import stages as upstream_stages
from chatterbox_turbo.upstream.families import identify
from chatterbox_turbo.upstream.stages import stages

STATIC = {"decoding": {"progress": "off", "kernel": "torch"}, "text": {"retries": 0, "target": 1.5, "longest": 1.5}}
EXACT = {"preset": "exact", "decoding": {"progress": "off"}}
TEXT, LANGUAGE = "It is. Or no?", {"language_id": "en"}
SPEECH = 40  # speech tokens: the planted way has come to the end of the text by then
STEP = 0.04

needs_analyzer = pytest.mark.skipif(not has_analyzer(), reason=NO_ANALYZER)


def way():
    """(n,) the text token that each speech token says: START, the language, a letter after the other."""
    generator = np.random.default_rng(5)
    return np.repeat(np.arange(400), generator.choice([1, 2, 3, 8], 400, p=[0.2, 0.5, 0.25, 0.05]))


def plant(t3, states):
    """Have upstream's three heads attend to text token ``states[n]`` at speech token n.

    Channels that nothing else writes to or reads hold a code of each text position, and at each speech position that
    of the text token to be found. The heads compare them in components that rotary embedding hardly turns.
    """
    codes = torch.randn(4096, 32, generator=torch.Generator().manual_seed(2)).sign()
    own = slice(t3.dim - 32, t3.dim)
    with torch.no_grad():
        for table in (t3.text_emb, t3.speech_emb):
            table.weight[:, own] = 0.0
        text, speech = t3.text_pos_emb.emb.weight, t3.speech_pos_emb.emb.weight
        text[:, own] = 20.0 * codes[: len(text)]
        speech[:, own] = 0.0
        speech[: len(states), own] = 20.0 * codes[torch.from_numpy(states)]
        t3.speech_head.weight[:, own] = 0.0
        for layer in t3.tfmr.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for writes in (attention.o_proj, mlp.down_proj):
                writes.weight[own] = 0.0
            for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reads.weight[:, own] = 0.0
        for number, head in ((12, 15), (13, 11), (9, 2)):
            for product in (t3.tfmr.layers[number].self_attn.q_proj, t3.tfmr.layers[number].self_attn.k_proj):
                rows = product.weight.unflatten(0, (-1, t3.tfmr.config.head_dim))[head]
                rows[:] = 0.0
                slow = len(rows) // 4  # the slow half of the frequencies
                rows[slow : 2 * slow, own][:, :slow] = torch.eye(slow)
                rows[3 * slow :, own][:, -slow:] = torch.eye(slow)


@pytest.fixture(scope="module")
def built():
    """A multilingual model whose heads follow the text."""
    model = synthetic.build("multilingual", "tiny", stop_after=SPEECH, seed=3)
    plant(model.t3, way())
    yield model
    turbo.revert(model)


@pytest.fixture
def model(built):
    turbo.apply(built, STATIC)
    yield built
    turbo.revert(built)


def expected(text, count):
    """Times of the words of a text by the planted way, in seconds."""
    states = way()[:count]
    starts = np.searchsorted(states, np.arange(401)) * STEP
    offset = 2  # START and the language; each character is a token
    chars = [index for index, char in enumerate(text)]
    result = []
    for first, last in words(text):
        inside = [index for index in chars[first:last] if text[index].isalnum()]
        result.append((starts[inside[0] + offset], starts[inside[-1] + offset + 1]))
    return result


@needs_analyzer
def test_words_are_when_the_heads_read_them_and_samples_are_those_of_generate(model):
    state = torch.get_rng_state()
    speech = model.turbo.timed(TEXT, seed=7, **LANGUAGE)
    assert torch.equal(torch.get_rng_state(), state)
    count = speech.samples.size(1)
    seconds = count / model.sr
    assert [sentence.text for sentence in speech.sentences] == ["It is.", "Or no?"]
    assert [word.text for word in speech.words] == TEXT.split() and speech.rate == model.sr
    assert {one.source for one in (*speech.words, *speech.sentences)} == {"alignment"}
    for word, (start, end) in zip(speech.words, expected(TEXT, count // 960), strict=True):
        assert (word.start, word.end) == pytest.approx((start, end), abs=1e-6)
    first, second = speech.sentences
    assert (first.start, first.end) == (speech.words[0].start, speech.words[1].end) and second.end <= seconds
    torch.manual_seed(7)
    wav = model.generate(TEXT, **LANGUAGE)
    assert torch.equal(wav, speech.samples)
    assert model.turbo.token_model.loop.constraint._history._values is None, "memory that is kept"


@needs_analyzer
def test_what_is_kept_is_what_upstreams_analyzer_sees(built, monkeypatch):
    from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer

    text, seen, step = TEXT[-6:], [], AlignmentStreamAnalyzer.step

    def watched(self, logits, next_token=None):
        start, end = self.text_tokens_slice
        seen.append(torch.stack(self.last_aligned_attns).mean(dim=0)[-1, start:end].clone())
        return step(self, logits, next_token)

    own = stages(identify(built))
    asked = own.ask(own.bind((text,), LANGUAGE), built.conds)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(AlignmentStreamAnalyzer, "step", watched)
        torch.manual_seed(7)
        copy.deepcopy(built.t3).inference(**asked)  # a copy: it leaves its hooks
    upstream, times = torch.stack(seen), []
    for config in (EXACT, STATIC):
        turbo.apply(built, config)
        pipeline = built.turbo._pipeline
        utterance = pipeline.utterance(0, {"text": text, "seed": 7, **LANGUAGE})
        utterance.timed = True
        pipeline.decode([utterance])
        assert pipeline.engines.token_model.attention == []  # it is the utterance's
        found, count = utterance.attention, utterance.tokens.size(-1)
        assert found.shape == (count, len(text) + 3) and len(upstream) == count + 1  # with the stop token's
        if config is EXACT:
            assert pipeline.engines.token_model.backbone is None and torch.equal(found, upstream[:-1])
        assert torch.allclose(found[1:], upstream[1:-1], rtol=0, atol=1e-5) and found[1:].max() > 0.1
        times.append(times_of(utterance, 960 * count, 24_000))
    assert times[0] == times[1] and len(times[0]) == 2
    turbo.revert(built)


@needs_analyzer
def test_each_of_a_batch_has_the_times_that_it_has_alone(model, monkeypatch):
    monkeypatch.setattr(long_text, "MISSING", 0.0)
    monkeypatch.setattr(long_text, "FULL", 0.05)  # of 1000 tokens
    long = " ".join([TEXT] * 3)
    items = [{"text": TEXT, "seed": 0}, {"text": "No.", "seed": 1, "cfg_weight": 0.0}, {"text": long, "seed": 3}]
    items = [{**LANGUAGE, **item} for item in items]
    together = dict(model.turbo.as_completed([*items, {"text": 3}], slots=2, times=True))
    for number, item in enumerate(items[:2]):
        one = model.turbo.timed(**item)
        assert [(word.text, word.source) for word in together[number].words] == [
            (word.text, word.source) for word in one.words]  # fmt: skip
        for word, other in zip(together[number].words, one.words, strict=True):
            assert (word.start, word.end) == pytest.approx((other.start, other.end), abs=1e-6)
    assert isinstance(together[3], InvalidRequestError)
    whole = together[2]
    assert [word.text for word in whole.words] == long.split()
    torch.manual_seed(3)
    assert torch.equal(whole.samples, model.generate(long, **LANGUAGE))
    edges = [edge for word in whole.words for edge in (word.start, word.end)]
    assert edges == sorted(edges) and edges[-1] <= whole.samples.size(1) / model.sr
    # each piece begins where the samples of those before it end: the planted way is in each from its beginning
    pieces = long_text.LongText(model.turbo._pipeline).cut([long], "en")
    starts, first = [], expected(TEXT, SPEECH)[0][0]
    spoken = iter(whole.words)
    for piece in pieces:
        own = [next(spoken) for _ in piece.text.split()]
        starts.append(own[0].start - first)
    counts = [round(start * model.sr) for start in starts]
    assert counts[0] == 0 and all(b - a > 960 * 15 for a, b in pairwise(counts))
    silence = [whole.samples[0, count - 1000 : count] for count in counts[1:]]  # the pause before each piece
    assert all(part.abs().max() < whole.samples.abs().max() / 5 for part in silence)


def test_families_without_alignment_have_times_of_sentences_by_their_lengths(english, tmp_path):
    turbo.apply(english, STATIC)
    speech = english.turbo.timed("One fox. Or are there two of them?", seed=2)
    torch.manual_seed(2)
    assert torch.equal(english.generate("One fox. Or are there two of them?"), speech.samples)
    assert speech.words == () and {one.source for one in speech.sentences} == {"estimate"}
    first, second = speech.sentences
    assert first.start == 0.0 and first.end == second.start < speech.samples.size(1) / english.sr / 2
    assert second.end == pytest.approx(speech.samples.size(1) / english.sr)
    (tmp_path / "book.txt").write_text("One fox.")
    with pytest.raises(UnavailablePassError, match=r"Words have no times\. This model and release .* Leave words out"):
        english.turbo.read(tmp_path / "book.txt", tmp_path / "a.wav", subtitles="vtt", words=True)
    with pytest.raises(InvalidRequestError, match="written into subtitles"):
        english.turbo.read(tmp_path / "book.txt", tmp_path / "a.wav", words=True)


def test_a_model_whose_generate_is_not_known_has_no_times(english, monkeypatch):
    monkeypatch.setattr(upstream_stages, "why_not", lambda parts, journal: "another release")
    turbo.apply(english, STATIC)
    with pytest.raises(UnavailablePassError, match=r"has no times\. another release"):
        english.turbo.timed("One fox.")


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAVE", 1)
    monkeypatch.setattr(long_text, "MISSING", 0.0)
    path = tmp_path / "book.txt"
    path.write_text("It is & <it>. No.\n\nOr is it?\n\nNo.")
    return path


def clock(text):
    hours, minutes, seconds = text.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


@needs_analyzer
def test_subtitles_of_words_and_the_same_after_an_interruption(model, book):
    spoken = {"seed": 3, "subtitles": "vtt", **LANGUAGE}
    report = model.turbo.read(book, book.with_name("a.wav"), words=True, keep_parts=True, **spoken)
    (path,) = report.subtitles
    vtt = path.read_text()
    assert "&amp;" in vtt and "&lt;it>." in vtt
    marks = [clock(one) for one in re.findall(r"\d\d:\d\d:\d\d\.\d\d\d", vtt)]
    assert len(marks) > 7 and report.seconds >= marks[-1]
    for block in vtt.strip().split("\n\n")[1:]:
        (start, end), inside = (list(map(clock, re.findall(r"[\d:]+\.\d+", line))) for line in block.split("\n")[1:])
        assert [start, *inside, end] == sorted({start, *inside, end})  # they grow
    wave = json.loads((book.with_name("a.wav.parts") / "00000.json").read_bytes())
    assert [len(one["words"]) for one in wave] == [len(one["text"].replace("&", "").split()) for one in wave]
    again = model.turbo.read(book, book.with_name("a.wav"), **{**spoken, "subtitles": "srt"}, words=True)
    assert again.resumed == report.pieces == 3 and path.read_text() == vtt
    cues = [block.split("\n") for block in again.subtitles[0].read_text().strip().split("\n\n")]
    assert " ".join(cue[2] for cue in cues) == "It is & <it>. No. Or is it? No."
    edges = [clock(edge) for cue in cues for edge in cue[1].split(" --> ")]
    assert edges == sorted(edges)

    def stop(now):
        if now.pieces:
            raise KeyboardInterrupt

    output = book.with_name("b.wav")
    with pytest.raises(KeyboardInterrupt):
        model.turbo.read(book, output, words=True, progress=stop, **spoken)
    again = model.turbo.read(book, output, words=True, **spoken)
    assert 0 < again.resumed < again.pieces
    assert output.read_bytes() == book.with_name("a.wav").read_bytes() and again.subtitles[0].read_text() == vtt


@needs_analyzer
def test_pieces_that_were_said_without_times_have_none_later(model, book):
    output = book.with_name("d.wav")
    model.turbo.read(book, output, keep_parts=True, **LANGUAGE)
    with pytest.raises(InvalidRequestError, match=r"pieces without times of words.*--restart.*leave the words out"):
        model.turbo.read(book, output, subtitles="srt", words=True, **LANGUAGE)
    lines = model.turbo.read(book, output, subtitles="srt", **LANGUAGE).subtitles[0].read_text()
    assert lines.startswith("1\n00:00:00,000 --> ")


@needs_analyzer
def test_the_batch_command_tells_times_where_they_are_asked_for(prebuilt, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text('decoding = {kernel = "torch"}\n')
    (tmp_path / "p.jsonl").write_text('{"text": "One fox. Two?"}\n')
    arguments = ["batch", "p.jsonl", "-o", "out", "--synthetic", "--config", "c.toml", "--model", "multilingual"]
    assert main(arguments) == 0 and main([*arguments, "--times"]) == 0  # what has no times is said again
    plain, timed = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert "words" not in plain and [one["text"] for one in timed["words"]] == ["One", "fox.", "Two?"]
    assert [one["text"] for one in timed["sentences"]] == ["One fox.", "Two?"] and plain["seconds"] == timed["seconds"]
    assert timed["words"][-1]["end"] <= round(timed["seconds"], 3)
    assert main([*arguments, "--times"]) == 0 and "all 1 lines are finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--words", "--model", "multilingual"), "--words needs --subtitles"),
        (("--words", "--subtitles", "srt"), "--words needs --model multilingual"),
    ],
)
def test_misuse_of_the_read_command(capsys, tmp_path, arguments, fragment):
    (tmp_path / "book.txt").write_text("Hello.")
    code, line = error(capsys, "read", str(tmp_path / "book.txt"), *arguments)
    assert code == 2 and fragment in line


def test_boundaries_are_those_of_the_planted_way():
    """So that what is expected here does not hang on the way's own code."""
    states = way()[:SPEECH]
    found = boundaries(np.eye(60)[states])
    assert np.array_equal(found[: states[-1] + 1], np.searchsorted(states, np.arange(states[-1] + 1)))
