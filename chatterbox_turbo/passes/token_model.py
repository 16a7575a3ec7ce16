"""T3 as a function from requests to speech tokens, in upstream's terms: what the decoding pass puts in place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DecodingSection
from ..runtime.cpu.host_memory import use_huge_pages
from ..runtime.device import attention_kernels
from ..runtime.device.devices import on_device
from ..runtime.t3.alignment import AlignmentAnalysis
from ..runtime.t3.backbone import StaticBackbone, TransformersBackbone, padded
from ..runtime.t3.kv_cache import BUCKET, bucketed
from ..runtime.t3.requests import GUIDED, UNGUIDED, Request, Token, Vocabulary
from ..runtime.t3.sampling import guide
from ..runtime.t3.service import Service, Ticket
from ..runtime.t3.step_choice import choose_step
from ..runtime.t3.token_loop import Loop
from ..runtime.t3.transformer import prefill_format
from ..upstream import t3 as upstream_t3
from ..upstream import t3_weights
from ..upstream.alignment import UpstreamAnalysis, build_analyzer, contained, why_not_analysis
from ..upstream.prepared import Prepared
from .base import Setting, Switch
from .token_requests import TokenRequests, progress_of, tell

UPSTREAMS_LIMIT = 1000  # that generate asks for
LAG = 4  # steps that a GPU runs ahead of the host: more than a copy of a few bytes takes


def longest_of(t3: Any, section: Any) -> int:
    """Speech tokens that ``generate`` has at most, whatever the text, by the section ``decoding``."""
    return min(section.max_new_tokens or UPSTREAMS_LIMIT, upstream_t3.token_capacity(t3))


class TokenModel:
    """T3 as a function from requests to speech tokens, in upstream's terms.

    ``request``: upstream's arguments to a request; ``run``: requests to tokens; ``speak``: both, for one. ``calls``
    are those of upstream's function. ``service``: tokens as they come, of requests that share a batch. ``attention``:
    what the prefill is to attend by.
    """

    def __init__(
        self,
        t3: nn.Module,
        section: DecodingSection,
        static: bool,
        around: Setting | None = None,
        attention: attention_kernels.Wanted | None = None,
    ):
        self._t3, self._section, self._attention = t3, section, attention
        self._around = around or nullcontext  # of what computes tokens, not of what is kept for it
        if around is not None:
            self._section = section.model_copy(update={"kernel": "torch", "graphs": False})
        self._llama = upstream_t3.is_llama(t3)
        self._procedure = GUIDED if self._llama else UNGUIDED
        self._watch = t3_weights.watched_heads(t3)
        self.ends: list[str] = []  # why the speech of each request of the last run has ended (``Token.end``)
        self.attention: list[Tensor | None] = []  # of each ``aligned`` request of the last run (``Token.attention``)
        self.arrivals: list[float] = []  # when the host had each token of the last run (perf_counter)
        self.prepared: Prepared[Loop] | None = None  # without one, upstream's backbone computes
        if static:
            self.prepared = Prepared(lambda: t3_weights.modules(t3), self._make, lambda loop: loop.backbone.release())
        self.calls = Switch(self.speak)
        self.service = Service(self._serve)
        self.request = TokenRequests(t3, section.max_new_tokens, zero=static).request

    @property
    def loop(self) -> Loop | None:
        """The loop over the static backbone, with its graphs and cache, where there is one."""
        return None if self.prepared is None else self.prepared.value

    @property
    def backbone(self) -> StaticBackbone | None:
        """The static backbone, where there is one."""
        return None if self.loop is None else self.loop.backbone

    @property
    def unaligned(self) -> str:
        """Why no request can be ``aligned``; empty where they can."""
        if not self._watch:
            return "this model and release of chatterbox-tts have no heads that are known to follow the text"
        return why_not_analysis(self._t3)

    @property
    def longest(self) -> int:
        """Speech tokens that ``generate`` has at most, whatever the text."""
        return longest_of(self._t3, self._section)

    def prepare(self) -> str:
        """Read the weights as they are now and choose a step for them; the remark for the report."""
        return self.remark() if self.prepared is None else self.prepared.renew()

    def remark(self) -> str:
        """What computes a step, for the report."""
        return "upstream's backbone" if self.prepared is None else self.prepared.remark

    def release(self) -> None:
        """Give the memory of the static backbone back."""
        self.service.abort("The configuration of the model has changed meanwhile.")
        if self.prepared is not None:
            self.prepared.release()

    def _make(self) -> tuple[Loop, str]:
        weights = t3_weights.read(self._t3)
        laid = use_huge_pages(weights.storages()) if self._section.huge_pages else 0
        step, remark = choose_step(weights, self._watch, self._section.kernel, self._section.graphs)
        formats = [str(weights.dtype).removeprefix("torch."), *weights.schemes]
        remark += f", {' with '.join(formats)}"
        if laid:
            remark += f"; {laid / 2**20:.0f} MiB of weights in huge pages"
        analysis = AlignmentAnalysis(upstream_t3.stop_token(self._t3), self._t3.device) if self._watch else None
        lag = LAG if self._t3.device.type == "cuda" else 0
        dtype = prefill_format(step.cache_dtype, weights.device)
        kernel, chosen = attention_kernels.choose(self._attention, dtype, weights.device, weights.head_width)
        if chosen:
            remark += f"; prefill's {chosen}"
        backbone = StaticBackbone(weights, step, kernel, self._section.voice_bytes)
        return Loop(backbone, self._procedure, self._vocabulary(), analysis, lag), remark

    def capture(self, request: Request) -> None:
        """Have the graphs of every length that the request may come to, and a cache that is large enough for it."""
        if self.prepared is None or not self.prepared.current().backbone.captured:
            return
        backbone, first = self.prepared.current().backbone, request.embeds.size(1)
        backbone.cache.ensure(first + request.limit)  # at once: graphs hold its addresses
        for positions in range(bucketed(first + 1), bucketed(first + request.limit) + 1, BUCKET):
            length = max(first, positions - BUCKET)
            longer = request.embeds.repeat(1, -(-length // first), 1)[:, :length]
            self.run([replace(request, embeds=longer, limit=1)])

    @torch.inference_mode()
    def capture_streams(self, request: Request) -> None:
        """Have the graphs that streams of such a request begin with, for each number of them (``decoding.streams``).

        Cache and places are as many as they need: what is captured afterwards for fewer stays when the first stream
        comes, unless ``KVCache.begin`` finds that too much of the memory would lie idle.
        """
        if self.prepared is None or not self.prepared.current().backbone.captured:
            return
        self.service.drain()
        loop, most = self.prepared.current(), self._section.streams
        loop.backbone.cache.ensure(request.embeds.size(1) + request.limit)
        for count in sorted({min(padded(number), most) for number in range(1, most + 1)}):
            with self._around():
                for _ in loop.serve(iter([replace(request, limit=1)] * count), most, 2 if self._llama else 1):
                    pass

    def speak(self, *args: Any, **kwargs: Any) -> Tensor:
        """Speech tokens (1, n) int64 as ``T3.inference`` (the stop token included) or ``inference_turbo`` (without)."""
        with torch.inference_mode():
            (tokens,) = self.run([self.request(*args, **kwargs)])
        return tokens

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], slots: int | None = None, told: bool = True) -> list[Tensor]:
        """Speech tokens (1, n) int64 of each request.

        Args:
            slots: how many run at once.
            told: warn of speech that was cut, and refuse what has none; otherwise the caller looks at ``ends``.
        """
        self.service.drain()  # there is one batch, and one cache
        if self.prepared is None and len(requests) > 1:  # upstream's analyzer knows one text at a time
            each, ends, attention = [], [], []
            for request in requests:
                each += self.run([request], told=told)
                ends += self.ends
                attention += self.attention
            self.ends, self.attention = ends, attention
            return each
        device, total = self._t3.device, sum(request.limit for request in requests)
        advance, finish = progress_of(self._section, total)
        ids: list[list[int]] = [[] for _ in requests]
        ends: dict[int, tuple[str, int]] = {}
        self.arrivals, self.attention = [], [None] * len(requests)
        try:
            with ExitStack() as stack:
                stack.enter_context(self._contained())
                loop = self._loop(requests)
                stack.enter_context(self._around())
                for token in loop.generate(requests, slots):
                    self.arrivals.append(time.perf_counter())
                    if token.id is not None:
                        ids[token.request].append(token.id)
                        advance(sum(map(len, ids)))
                    if token.end is not None:
                        ends[token.request] = (token.end, token.reasons)
                        self.attention[token.request] = token.attention
        finally:
            finish()
            self._rest()
        self.ends = [ends[number][0] for number in range(len(requests))]
        for number, request in enumerate(requests):
            if told:
                tell(request, len(ids[number]), *ends[number])
            if not self._llama and ids[number][-1:] == [upstream_t3.stop_token(self._t3)]:
                ids[number].pop()  # inference_turbo returns speech without it
        return [on_device(torch.tensor([row], dtype=torch.long, device="cpu"), device) for row in ids]

    def _serve(self, source: Iterator[Request | None]) -> Iterator[Token]:
        if self.prepared is None:
            tokens = self._in_turn(source)
        else:
            tokens = self.prepared.current().serve(source, self._section.streams, 2 if self._llama else 1)
        try:
            while True:
                with self._around():  # not while whoever wants the token goes on with it
                    if self.prepared is not None:
                        self.prepared.needed()  # flow and vocoder may have taken T3's place on the device meanwhile
                    token = next(tokens, None)
                if token is None:
                    return
                yield token
        finally:
            tokens.close()
            self._rest()

    def _in_turn(self, source: Iterator[Request | None]) -> Iterator[Token]:
        for number, request in enumerate(source):
            if request is None:
                return
            with self._contained():
                for token in self._loop([request]).generate([request]):
                    yield replace(token, request=number)

    def _rest(self) -> None:
        """Let the cache of keys and values go on a CPU, or it would lie beside what the audio needs."""
        if self.backbone is not None and self._t3.device.type == "cpu":
            self.backbone.rest()

    def told(self, ticket: Ticket) -> None:
        """Warn of speech that ended otherwise than by the model's own will.

        Raises:
            DecodingError: there is none.
        """
        if ticket.end is not None:
            tell(ticket.request, len(ticket.ids), ticket.end, ticket.reasons)

    @torch.inference_mode()
    def logits(self, request: Request, tokens: Sequence[int]) -> Tensor:
        """Logits (n, V) fp32 after guidance that precede each of n given tokens (teacher forcing)."""
        self.service.drain()
        with self._contained():
            return self._taught(self._loop([request]), request, tokens)

    def _taught(self, loop: Loop, request: Request, tokens: Sequence[int]) -> Tensor:
        rows, rest = request.embeds.size(0), len(tokens) - 1
        weight = torch.tensor([[request.knobs.guidance]], device=request.embeds.device)
        given = torch.tensor([tokens[:-1]], dtype=torch.long, device=weight.device)
        positions = torch.arange(1, rest + 1, device=weight.device)
        with self._around():
            loop.backbone.begin(1, rows)
            each = [loop.backbone.admit([request.embeds], [rest + 1], [request.voice])]
            for index in range(rest):
                embeds = loop.vocabulary.embed(given[:, index : index + 1], positions[index : index + 1])
                each.append(loop.backbone.step(embeds.expand(rows, -1))[0].clone())
        return torch.cat([guide(row[None].float(), weight) for row in each])

    def _contained(self) -> AbstractContextManager[None]:
        """What upstream's analyzer does to upstream's backbone ends with the block."""
        if self.prepared is not None or not self._llama:
            return nullcontext()
        return contained(upstream_t3.backbone(self._t3))

    def _loop(self, requests: Sequence[Request]) -> Loop:
        if self.prepared is not None:
            return self.prepared.current()  # kept, with its graphs
        t3 = self._t3
        maps = upstream_t3.needs_attention_maps(t3)
        backbone = TransformersBackbone(upstream_t3.backbone(t3), upstream_t3.head(t3), maps)
        # its hooks see the prefill, so it is built before; and one analyzer knows one text
        analyzer = build_analyzer(t3, *requests[0].text) if requests[0].text else None
        return Loop(backbone, self._procedure, self._vocabulary(), analyzer and UpstreamAnalysis(analyzer))

    def _vocabulary(self) -> Vocabulary:
        t3 = self._t3
        return Vocabulary(
            upstream_t3.start_token(t3),
            upstream_t3.stop_token(t3),
            lambda ids, at: upstream_t3.embed_tokens(t3, ids, at),
            lambda: upstream_t3.embedding_addresses(t3),
        )
