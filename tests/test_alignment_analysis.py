"""The batched analysis against upstream's own ``AlignmentStreamAnalyzer``, step by step and to the bit."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from cases import NO_ANALYZER
from torch import Tensor, nn

from chatterbox_turbo.errors import InvalidRequestError
from chatterbox_turbo.runtime.t3 import alignment
from chatterbox_turbo.runtime.t3.alignment import AlignmentAnalysis, describe

upstream = pytest.importorskip("chatterbox.models.t3.inference.alignment_stream_analyzer", reason=NO_ANALYZER)

STOP, VOCABULARY, WIDTH = 5, 12, 72
KINDS = ("random", "walk", "tail", "back", "ties")
NUMBER = {torch.float32: 1200, torch.float16: 100, torch.bfloat16: 100}
LAYERS = {layer: nn.Module() for layer, _ in upstream.LLAMA_ALIGNED_HEADS}
for _layer in LAYERS.values():
    _layer.self_attn = nn.Identity()


@dataclass
class Stream:
    """One utterance as both sides see it, and upstream's answer: (logits, position, reasons) of each step."""

    kind: str
    start: int
    length: int
    heads: Tensor  # (steps, 3, WIDTH), the first step's is that of the last position of the chunk
    chunk: Tensor  # (3, T, WIDTH)
    logits: Tensor  # (steps, VOCABULARY)
    ids: Tensor  # (steps,)
    answers: list[tuple[Tensor, int, int]] = field(default_factory=list)


def draw_rows(kind: str, length: int, steps: int, pick: random.Random, g: torch.Generator) -> Tensor:
    """Attention (steps, S) of one utterance."""
    noise = torch.randn(steps, length, generator=g)
    if kind == "random":
        return torch.softmax(noise * pick.choice((0.5, 2.0, 6.0)), dim=1)
    speed = pick.uniform(0.3, 1.0) if kind == "walk" else 1.0
    centers = torch.arange(steps) * speed + torch.randn(steps, generator=g) * pick.choice((0.0, 0.3, 1.5))
    if kind == "walk":
        jumps = torch.rand(steps, generator=g) < 0.15
        centers += jumps * torch.randint(-12, 13, (steps,), generator=g)
    end = length - 1 - pick.choice((0, 0, 1, 2))
    centers = centers.round().long().clamp(0, max(end, 0))
    turn = length + pick.randrange(4)
    if kind == "back":
        centers[turn:] = (torch.arange(max(steps - turn, 0)) + pick.randrange(length)) % max(length - 4, 1)
    if kind == "ties":  # halves and ones, whose sums are exact: the limits are met to the bit
        rows = nn.functional.one_hot(centers, length).float()
        rows[turn:] = 0
        for place in pick.choice(((max(end, 0),), (0,), (0, length - 1))):
            rows[turn:, place] = pick.choice((0.5, 1.0))
        rows[torch.rand(steps, generator=g) < 0.1] = 0.25  # all equal: the first token wins
        return rows
    distance = (torch.arange(length) - centers[:, None]).float()
    return torch.softmax(-(distance**2) / pick.choice((0.2, 1.0, 4.0)) + 0.5 * noise, dim=1)


def draw_stream(seed: int, dtype: torch.dtype) -> Stream:
    pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    length = pick.choice((pick.randint(1, 5), *(pick.randint(6, 20),) * 7, pick.randint(21, 60)))
    start, chunk, steps = pick.randrange(8), pick.randint(1, 3), length + 20
    text = draw_rows(kind, length, steps + chunk - 1, pick, g)[:, None].repeat(1, 3, 1)
    if kind != "ties" and pick.random() < 0.5:  # three different heads
        text = (text * (1 + 0.4 * torch.randn(text.shape, generator=g))).clamp(min=0)
    # far above any attention, where neither side may look
    heads = 9 * torch.rand(steps + chunk - 1, 3, WIDTH, generator=g)
    heads[:, :, start : start + length] = text
    stuck = pick.choice((0.0, 0.0, 0.03, 0.5))
    ids = [pick.randrange(VOCABULARY)]
    for _ in range(steps - 1):
        ids.append(ids[-1] if pick.random() < stuck else (ids[-1] + 1) % VOCABULARY)
    logits = (torch.randn(steps, VOCABULARY, generator=g) * 5).to(dtype)
    return Stream(kind, start, length, heads[chunk - 1 :], heads[:chunk].transpose(0, 1), logits, torch.tensor(ids))


class Reasons(logging.Handler):
    """Reads from upstream's warning why it forces the stop token."""

    flags = 0

    def emit(self, record: logging.LogRecord) -> None:
        found = re.findall(r"(long_tail|alignment_repetition|token_repetition)=(?:tensor\()?True", record.getMessage())
        self.flags = sum(getattr(alignment, name.upper()) for name in found)


@torch.inference_mode()
def ask_upstream(stream: Stream, reasons: Reasons, counts: Counter) -> None:
    """Run upstream's analyzer over a stream, and count what it decides."""
    span = (stream.start, stream.start + stream.length)
    analyzer = upstream.AlignmentStreamAnalyzer(SimpleNamespace(layers=LAYERS), None, span, eos_idx=STOP)
    before_text = torch.full((3, span[1], WIDTH), 9.0)
    for step, logits in enumerate(stream.logits):
        maps = torch.cat((before_text, stream.chunk), dim=1) if step == 0 else stream.heads[step, :, None]
        analyzer.last_aligned_attns = list(maps)
        reasons.flags = 0
        try:
            out = analyzer.step(logits[None].clone(), next_token=int(stream.ids[step]))
        except IndexError:
            assert analyzer.complete and stream.length <= 5
            counts["raised"] += 1
            return
        position = int(analyzer.text_position)
        stream.answers.append((out[0], position, reasons.flags))
        counts.update(bit for bit in alignment.PHRASES if reasons.flags & bit)
        counts["suppressed"] += reasons.flags == 0 and bool(out[0, STOP] == -(2**15))
        counts["unchanged"] += torch.equal(out[0], logits)
        counts["discontinuous"] += int(analyzer.alignment[-1].argmax()) != position


@pytest.fixture(scope="module")
def streams() -> tuple[dict[torch.dtype, list[Stream]], Counter]:
    """Streams by the dtype of their logits with upstream's answers, and how often upstream decided what."""
    counts, reasons = Counter(), Reasons()
    upstream.logger.addHandler(reasons)
    upstream.logger.propagate = False
    try:
        drawn = {dtype: [draw_stream(seed, dtype) for seed in range(number)] for dtype, number in NUMBER.items()}
        for some in drawn.values():
            for stream in some:
                ask_upstream(stream, reasons, counts)
    finally:
        upstream.logger.removeHandler(reasons)
        upstream.logger.propagate = True
    return drawn, counts


@torch.inference_mode()
def replay(streams: list[Stream], device: str = "cpu", together: int = 24) -> int:
    """Run streams through one analysis, joining late and leaving early; returns the steps compared, all equal.

    What is kept of every third is what it was shown, whoever comes and goes beside it.
    """
    pick, compared = random.Random(1), 0
    ours, waiting = AlignmentAnalysis(STOP, device), [stream for stream in streams if stream.answers]
    running: list[list] = []  # [stream, step, flags]
    while waiting or running:
        if running:
            width = max(s.start + s.length for s, _, _ in running) + pick.randrange(4)
            maps = [torch.stack(list(s.heads[step])).mean(dim=0) for s, step, _ in running]
            ours.observe(torch.stack(maps)[:, :width].to(device))
        while waiting and (not running or (len(running) < together and pick.random() < 0.6)):
            running.append([stream := waiting.pop(), 0, 0])
            text = slice(stream.start, stream.start + stream.length)
            ours.admit(stream.start, stream.chunk[:, :, text].size(-1))
            if stream.length % 3 == 0:
                ours.keep(len(stream.answers))
        logits = torch.stack([s.logits[step] for s, step, _ in running]).to(device)
        ids = torch.stack([s.ids[step] for s, step, _ in running]).to(device)
        untouched, got = logits.clone(), ours.constrain(logits, ids)
        ids.fill_(-7)  # a caller may reuse its buffer
        answers = [s.answers[step] for s, step, _ in running]
        for one, answer in zip(running, answers, strict=True):
            one[2] |= answer[2]
        assert len(ours) == len(running) and torch.equal(logits, untouched) and got.dtype == logits.dtype
        assert torch.equal(got.cpu(), torch.stack([out for out, _, _ in answers]))
        assert ours.positions().tolist() == [position for _, position, _ in answers]
        assert ours.reasons().tolist() == [flags for _, _, flags in running]
        compared += len(running)
        for number in reversed(range(len(running))):
            stream, step, _ = running[number]
            running[number][1] = step + 1
            if step + 1 == len(stream.answers) or pick.random() < 0.004:
                if stream.length % 3 == 0:
                    shown = stream.heads[: step + 1, :, stream.start : stream.start + stream.length].mean(dim=1)
                    shown[0] = 0.0
                    assert ours.keeping() and torch.equal(ours.kept(number, step + 1).cpu(), shown)
                ours.leave(number)
                running[number] = running[-1]
                running.pop()
    return compared


@pytest.mark.parametrize("dtype", NUMBER, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_decisions_equal_upstreams(streams, dtype, device):
    assert replay(streams[0][dtype], device) > 20 * NUMBER[dtype]


def test_upstream_decides_each_way_often(streams):
    counts = streams[1]
    for decision in (1, 2, 4, "suppressed", "unchanged", "discontinuous", "raised"):
        assert counts[decision] >= 50, decision


CHANGED = {"TAIL_LIMIT": (4.501, 5.001), "REPETITION_LIMIT": (4.999, 5.499), "ENDING": (2, 4), "RECENT": (4, 6)}
CHANGED |= {"BACKWARD": (-5, -3), "FORWARD": (6, 8), "BOUND": (2.0**14,)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in CHANGED for value in CHANGED[name]])
def test_a_changed_rule_is_noticed(streams, monkeypatch, name, value):
    monkeypatch.setattr(alignment, name, value)
    with pytest.raises(AssertionError):
        replay(streams[0][torch.float32])


def test_nothing_is_kept_unasked_and_nothing_stays():
    ours = AlignmentAnalysis(STOP, "cpu")
    for length in (5, 7, 300):
        ours.admit(2, length)
        assert ours.keeping() is None
    ours.keep(9)
    ours.admit(0, 4)
    assert ours.keeping()[1:] == (4, 10, 384)
    ours.leave(2)
    assert ours.keeping() is None and ours._history._values is None


def test_no_step_waits_for_the_device():
    """The meta device has no values: whatever needs one on the host raises."""
    ours = AlignmentAnalysis(STOP, "meta")
    for length in (3, 9):
        ours.admit(4, length)
    ours.keep(5)
    for _ in range(3):
        ours.observe(torch.empty(2, 20, device="meta"))
        out = ours.constrain(torch.empty(2, VOCABULARY, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"))
    assert ours.kept(1, 3).shape == (3, 9)
    ours.leave(0)
    assert out.is_meta and out.shape == (2, VOCABULARY) and len(ours) == 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        ours.positions().tolist()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_texts_that_upstream_fails_on_end_by_the_other_reasons(length):
    """Nothing precedes the ending of a tiny text: going back in it is no repetition, staying is a long tail."""
    for place, stop in ((0, (5, 6, 6, None, None)[length - 1]), (length - 1, (5, 5, 6, 8, 9)[length - 1])):
        ours = AlignmentAnalysis(0, "cpu")
        ours.admit(0, length)
        ours.constrain(torch.zeros(1, 4), torch.tensor([0]))
        for step in range(1, 20):
            reached = length - 1 if step == length else place
            ours.observe(nn.functional.one_hot(torch.tensor([reached]), length).float())
            out = ours.constrain(torch.zeros(1, 4), torch.tensor([step]))
            assert step != length or ours.positions().tolist() == [length - 1]
            forced = stop is not None and step >= stop
            assert out.tolist() == ([[2**15, *[-(2**15)] * 3]] if forced else [[0] * 4])
            assert ours.reasons().tolist() == [alignment.LONG_TAIL * forced]


def test_reasons_have_phrases():
    assert describe(0) == [] and len(describe(7)) == 3
    assert describe(5) == describe(1) + describe(4) and all(describe(bit) for bit in (1, 2, 4))


def test_what_does_not_fit_is_refused():
    ours = AlignmentAnalysis(STOP, "cpu")
    for start, length in ((0, 0), (-1, 4)):
        with pytest.raises(InvalidRequestError, match="must have at least one"):
            ours.admit(start, length)
    ours.admit(3, 4)
    for shape in ((2, 9), (1, 6), (7,)):
        with pytest.raises(InvalidRequestError, match=r"must be \(1, 7 or more\)"):
            ours.observe(torch.ones(shape))
    for logits, previous in (((2, 9), 2), ((1, 9), 2), ((9,), 1)):
        with pytest.raises(InvalidRequestError, match="do not fit 1 requests"):
            ours.constrain(torch.ones(logits), torch.ones(previous, dtype=torch.long))
    for number in (-1, 1):
        with pytest.raises(InvalidRequestError, match=f"no request {number} among 1"):
            ours.leave(number)
