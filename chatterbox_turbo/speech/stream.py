"""Speech that is heard while it is made: blocks of marked samples, with figures about them.

A stream goes through the same stages as ``generate`` (``upstream/stages.py``), window by window: T3's tokens come from
a batch that all streams of a model share (``runtime.t3.service``), flow matching and vocoder run over windows of them
(``runtime.s3gen.streaming``), and one watermark spans the whole of it (``runtime.voice.marking``). The model is locked
for a block, and free between two of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidRequestError, UnavailablePassError
from ..runtime import forks
from ..runtime.device.devices import on_device
from ..runtime.s3gen.drawn import seeded
from ..runtime.s3gen.streaming import AcousticStream, Windows
from ..runtime.voice.marking import MarkStream
from ..upstream.flow_inputs import TOKEN_SAMPLES
from ..upstream.flow_windows import FlowWindows
from ..upstream.warmup import copy_voice
from .pipeline import Pipeline
from .utterance import Draws, Utterance

NOISE_FRAMES = 50  # of flow matching's noise that are drawn at once
_END: Any = object()  # of a stream's blocks
AHEAD = 2  # pieces of a text whose tokens are decoded beside each other
LOOK = 0.25  # seconds between two looks at whether the model has been changed, which take 6 ms each at full size


@dataclass(frozen=True)
class StreamMetrics:
    """Figures of a stream up to a block.

    Attributes:
        chunk: number of the block, from 0.
        seconds: of audio so far, this block included.
        elapsed: seconds since the stream was asked for.
        first_audio: seconds until the first block was there.
        real_time_factor: seconds of work for a second of audio.
        tokens: speech tokens so far.
        lead: seconds that a player which began with the first block still has to play when this one comes; below 0 it
            has run dry.
    """

    chunk: int
    seconds: float
    elapsed: float
    first_audio: float
    real_time_factor: float
    tokens: int
    lead: float


class Segment:
    """One utterance of a stream, on its way from T3 to samples; the caller holds the model's lock.

    Args:
        item: as ``Pipeline.utterance`` takes it, and optionally ``pause``, seconds of silence behind it.
    """

    def __init__(self, pipeline: Pipeline, number: int, item: Mapping[str, Any], windows: Windows | None):
        self._pipeline, self._stages = pipeline, pipeline.stages
        self.pause = float(item.get("pause", 0.0))
        arguments = {name: value for name, value in item.items() if name != "pause"}
        self.utterance: Utterance = pipeline.utterance(number, arguments)
        self._engine, self._ticket = pipeline.engines.token_model, None
        if self._engine is not None:
            self._ticket = self._engine.service.submit(pipeline.request(self.utterance))
        self._acoustic = _acoustic(pipeline, self.utterance, windows)
        self.tokens = 0  # speech tokens so far

    def blocks(self) -> Iterator[Tensor | None]:
        """Samples (m,) as they become complete; ``None`` after each token that completes none."""
        if self._ticket is None:
            yield from self._converted()
            return
        ticket, service = self._ticket, self._engine.service
        try:
            while not ticket.over:
                # not more than a window wants, though there may be more: or the sound would depend on who else speaks
                wanted = self._acoustic.wanted()
                while not ticket.over and len(self._sounding()) < wanted:
                    service.advance(ticket, len(ticket.ids) + 1)
                    yield None
                if not ticket.over:
                    yield from self._acoustic.push(self._fresh(wanted))
            self._engine.told(ticket)
            yield from self._rest()
        finally:
            self.leave()

    def _converted(self) -> Iterator[Tensor]:
        """Of a recording, whose tokens are there at once (voice conversion)."""
        stages, utterance = self._stages, self.utterance
        asked = stages.ask(utterance.given, utterance.voice)
        with torch.inference_mode():
            tokens = stages.spoken(stages.decode(asked)).flatten()
        self.tokens = len(tokens)
        yield from self._acoustic.run([tokens])

    def leave(self) -> None:
        """Nobody wants the rest."""
        if self._ticket is not None:
            self._ticket.request.abandoned = True
        self._acoustic.close()

    def _rest(self) -> Iterator[Tensor]:
        """What is left once all tokens are there, by the same windows."""
        count = len(self._sounding())
        while self.tokens < count:
            yield from self._acoustic.push(self._fresh(min(self._acoustic.wanted(), count)))
        yield from self._acoustic.finish()

    def _sounding(self) -> list[int]:
        return self._stages.sounding(self._ticket.ids)

    def _fresh(self, count: int) -> Tensor:
        new = self._sounding()[self.tokens : count]
        self.tokens += len(new)
        # through pinned memory, or each window would wait for the device before it is begun
        return on_device(torch.tensor(new, dtype=torch.long, device="cpu"), self._pipeline.parts.device)


def _acoustic(pipeline: Pipeline, utterance: Utterance, windows: Windows | None) -> AcousticStream:
    """Tokens to samples of one utterance, with random numbers of its own that T3's do not shift."""
    stages, engines, parts = pipeline.stages, pipeline.engines, pipeline.parts
    reference, seed = stages.voice_reference(utterance.voice), utterance.draws.seed
    if engines.flow is not None:
        reference = engines.flow.own({"ref_dict": reference})["ref_dict"]
    frames = torch.as_tensor(reference["prompt_feat"]).size(1)
    prompt = seeded(80, 1, parts.device, seed + 2).between(0, frames)
    flow = FlowWindows(parts.s3gen, reference, prompt, steps=stages.steps())

    def mels(tokens: Tensor, first: int, noise: Tensor) -> Tensor:
        if engines.flow is not None:
            engines.flow.prepared.current()  # the part is on the device
        return stages.in_format(flow(tokens, first, noise))

    crop = 0 if stages.crop(2) is None else TOKEN_SAMPLES
    noise, vocoder = seeded(80, NOISE_FRAMES, parts.device, seed + 1), engines.vocoder
    vocode, windows = vocoder.streamed(seed + 3), windows or vocoder.windows
    tail, reach = stages.tail(), vocoder.reach
    return AcousticStream(mels, vocode, noise, windows, stages.fade(), tail, flow.skipped, crop, reach)


def warm_up(pipeline: Pipeline) -> None:
    """Have the CUDA graphs of flow matching and vocoder for a stream's first window, by the model's own voice.

    That window is as long in every stream of a voice, and who waits for it waits for the capture.
    """
    engines, parts, windows = pipeline.engines, pipeline.parts, Windows()
    if parts.device.type != "cuda" or parts.voice is None or engines.vocoder is None or pipeline.alone:
        return
    utterance = Utterance(0, {}, copy_voice(parts.voice), Draws(parts.device, 0))
    stream = _acoustic(pipeline, utterance, windows)
    behind = windows.seen if parts.t3 is None else windows.look_ahead  # voice conversion has all tokens at once
    tokens = torch.arange(windows.first_chunk + behind, device=parts.device)
    with ExitStack() as stack:
        for network in (engines.flow and engines.flow.solver, engines.vocoder.network):
            if network is not None:
                stack.enter_context(network.at_once())
        for _ in stream.push(tokens):
            pass
    stream.close()


class SpeechStream:
    """An iterator, also an asynchronous one, over (samples (1, m) float32 on the host, ``StreamMetrics``).

    Close it, or leave its ``with``, where not all of it is wanted.

    Args:
        working: the model for a block: its lock and surroundings; yields its pipeline, or the reason why there is none.
            Its argument: whether to look if the model has been changed.
        items: utterances, read as they are needed.
    """

    def __init__(
        self,
        working: Callable[[bool], AbstractContextManager[Pipeline]],
        items: Iterable[Mapping[str, Any]],
        windows: Windows | None,
    ):
        self._working, self._items, self._windows = working, items, windows
        self._start = time.perf_counter()
        self._pipeline: Pipeline | None = None
        self._blocks: Iterator[Tensor] | None = None
        self._open: list[Segment] = []
        self._sent = self._samples = self._tokens = 0
        self._first = self._busy = 0.0
        self._looked = 0.0
        self._turn = forks.lock()  # whoever closes waits for what another thread is making
        self._closed = False

    def __iter__(self) -> SpeechStream:
        return self

    def __next__(self) -> tuple[Tensor, StreamMetrics]:
        return self._advanced(None)

    def poll(self, tokens: int = 1) -> tuple[Tensor, StreamMetrics] | None:
        """As ``next``, but ``None`` once the batch has made so many tokens and no block is complete.

        For who has several streams and waits for none of them alone: the tokens of the others come beside these.

        Raises:
            StopIteration: it has ended.
        """
        return self._advanced(tokens)

    def _advanced(self, most: int | None) -> tuple[Tensor, StreamMetrics] | None:
        with self._turn:
            if self._closed:
                raise StopIteration
            begun = time.perf_counter()
            try:
                look = self._pipeline is None or begun - self._looked >= LOOK
                with self._working(look) as pipeline:
                    self._looked = time.perf_counter() if look else self._looked
                    if self._pipeline is None:
                        self._pipeline = pipeline
                        self._blocks = self._made(pipeline)
                    if pipeline is not self._pipeline:
                        raise UnavailablePassError("The model's configuration has changed while it was streaming.")
                    block = None
                    while block is None and most != 0 and not self._closed:
                        block, most = next(self._blocks, _END), None if most is None else most - 1
            except BaseException:
                self.close()
                raise
            if block is _END or self._closed:
                self.close()
                raise StopIteration
            now = time.perf_counter()
            self._busy += now - begun
            return None if block is None else (block[None], self._metrics(block, now))

    def _metrics(self, block: Tensor, now: float) -> StreamMetrics:
        rate, before = self._pipeline.parts.model.sr, self._samples
        if not self._sent:
            self._first = now - self._start
        lead = before / rate - (now - self._start - self._first)
        self._samples += len(block)
        self._sent += 1
        seconds = self._samples / rate
        tokens = self._tokens + sum(segment.tokens for segment in self._open)
        factor = self._busy / seconds
        return StreamMetrics(self._sent - 1, seconds, now - self._start, self._first, factor, tokens, lead)

    def _made(self, pipeline: Pipeline) -> Iterator[Tensor | None]:
        """Marked blocks (m,) of all segments; ``None`` after each token that completes none."""
        marks = MarkStream(lambda signal: pipeline.stages.watermark(signal))
        for samples in self._spoken(pipeline):
            if samples is None:
                yield None
                continue
            for block in marks.push(samples.float().cpu().numpy()):
                yield torch.from_numpy(np.ascontiguousarray(block))
        for block in marks.finish():
            yield torch.from_numpy(np.ascontiguousarray(block))

    def _spoken(self, pipeline: Pipeline) -> Iterator[Tensor | None]:
        rest = enumerate(self._items)
        rate = pipeline.parts.model.sr
        try:
            while True:
                while len(self._open) < AHEAD:  # the next one's tokens are decoded beside those of this one
                    entry = next(rest, None)
                    if entry is None:
                        break
                    self._open.append(Segment(pipeline, *entry, self._windows))
                if not self._open:
                    return
                segment = self._open[0]
                yield from segment.blocks()
                self._tokens += segment.tokens
                self._open.pop(0)
                if segment.pause and self._open:
                    yield torch.zeros(int(segment.pause * rate))
        finally:  # also of a stream that is dropped without being closed
            for segment in self._open:
                segment.leave()
            self._open.clear()

    def close(self) -> None:
        """Let go of everything; the model goes on with what others want of it. Nothing more comes.

        While another thread makes the next block, this waits for a token or a window at most, and ends it.
        """
        self._closed = True
        with self._turn:
            blocks, self._blocks = self._blocks, None
            if blocks is None:
                return
            try:
                with suppress(UnavailablePassError), self._working(True) as pipeline:
                    blocks.close()
                    # what the batch holds for nobody goes with the next step, or now
                    if pipeline.engines.token_model is not None:
                        pipeline.engines.token_model.service.tidy()
            finally:
                blocks.close()  # also where the model streams no more

    def __enter__(self) -> SpeechStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __aiter__(self) -> SpeechStream:
        return self

    async def __anext__(self) -> tuple[Tensor, StreamMetrics]:
        # StopIteration cannot leave a future
        result = await asyncio.to_thread(next, self, None)
        if result is None:
            raise StopAsyncIteration
        return result

    async def aclose(self) -> None:
        """``close`` that does not block the loop."""
        await asyncio.to_thread(self.close)


def joined(blocks: Sequence[tuple[Tensor, StreamMetrics]]) -> Tensor:
    """Samples (1, n) of all blocks of a stream.

    Raises:
        InvalidRequestError: there are none.
    """
    if not blocks:
        raise InvalidRequestError("The stream gave no audio.")
    return torch.cat([samples for samples, _ in blocks], dim=1)
