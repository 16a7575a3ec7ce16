"""The token loop of T3 in place of upstream's, over upstream's backbone or over this package's own.

Replaces ``T3.inference`` (Llama) and ``T3.inference_turbo`` (GPT-2) of upstream's ``t3.py`` by
``runtime.token_loop``. What the caller passes, and what it gets back, stays upstream's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..config import DecodingSection, Fidelity, OptimizationConfig
from ..errors import DecodingError, InvalidRequestError, SpeechTruncatedWarning, UnsupportedModelError
from ..runtime import arguments
from ..runtime.cpu.host_memory import use_huge_pages
from ..runtime.t3.alignment import AlignmentAnalysis, describe
from ..runtime.t3.backbone import StaticBackbone, TransformersBackbone
from ..runtime.t3.sampling import SamplingParameters, guide
from ..runtime.t3.step_choice import choose_step
from ..runtime.t3.token_loop import GUIDED, UNGUIDED, Loop, Request, Vocabulary
from ..upstream import t3 as upstream_t3
from ..upstream import t3_weights
from ..upstream.alignment import UpstreamAnalysis, build_analyzer
from ..upstream.patch_points import GPT2, LLAMA
from .base import Call, Context, Pass, Scope, Switch, parameters

logger = logging.getLogger(__name__)
TOKENS_PER_SECOND = 25
LAG = 4  # steps that a GPU runs ahead of the host: more than a copy of a few bytes takes


class DecodingPass(Pass):
    """One loop for all families; random numbers are drawn as upstream draws them."""

    name = "decoding"
    summary = "one token loop; fused weights, a static cache and the fastest step for this machine"
    families = (*LLAMA, *GPT2)
    patch_points = ("t3.inference", "t3.inference_turbo", "t3.prepare_input_embeds", "t3.tfmr.forward")
    replaces = ("t3.inference", "t3.inference_turbo")

    def fidelity(self, context: Context) -> Fidelity:
        return "numerical" if _static(context.config) else "exact"

    def check(self, context: Context) -> str:
        section, t3 = context.config.decoding, context.parts.t3
        capacity = upstream_t3.token_capacity(t3)
        if section.max_new_tokens is not None and section.max_new_tokens > capacity:
            return f"decoding.max_new_tokens is {section.max_new_tokens}, but the model has positions for {capacity}"
        if _static(context.config):
            try:
                t3_weights.check(t3)
            except UnsupportedModelError as error:
                return str(error)
        return ""

    def apply(self, context: Context) -> str:
        t3, remark = context.parts.t3, "upstream's backbone"
        model = TokenModel(t3, context.config.decoding)
        if _static(context.config):
            t3_weights.fuse(t3, context.journal)
            context.journal.record("cache of keys and values", model.release)
            remark = model.prepare()
        name = "inference" if upstream_t3.is_llama(t3) else "inference_turbo"
        context.journal.wrap(t3, name, lambda wrapped, instance, args, kwargs: model.calls(*args, **kwargs))
        context.engines.token_model = model
        context.scopes.append(_plain_numbers(context.parts.model))
        return remark


def _plain_numbers(model: Any) -> Scope:
    """Look at the numbers of a call before anything is done with them: upstream keeps ``exaggeration`` in the voice."""
    names = parameters(model.generate)

    @contextmanager
    def scope(call: Call) -> Iterator[None]:
        call.rewrite(names, arguments.plain)
        yield

    return scope


def _static(config: OptimizationConfig) -> bool:
    backbone = config.decoding.backbone
    return backbone == "static" or (backbone == "auto" and config.fidelity != "exact")


class TokenModel:
    """T3 as a function from requests to speech tokens, in upstream's terms.

    ``request``: upstream's arguments to a request; ``run``: requests to tokens; ``speak``: both, for one. ``calls``
    are those of upstream's function.
    """

    def __init__(self, t3: nn.Module, section: DecodingSection):
        self._t3, self._section = t3, section
        self._llama = upstream_t3.is_llama(t3)
        self._backbone: StaticBackbone | None = None
        self._addresses: Any = None
        self._watch = t3_weights.watched_heads(t3)
        self.calls = Switch(self.speak)
        self.request = self._guided_request if self._llama else self._unguided_request

    def prepare(self) -> str:
        """Read the weights as they are now and choose a step for them; the remark for the report."""
        with torch.inference_mode(False), torch.no_grad():  # parameters outlive the call
            weights = t3_weights.read(self._t3)
            laid = use_huge_pages(weights.matrices()) if self._section.huge_pages else 0
            step, remark = choose_step(weights, self._watch, self._section.kernel, self._section.graphs)
        self._backbone, self._addresses = StaticBackbone(weights, step), t3_weights.addresses(self._t3)
        if laid:
            remark += f"; {laid / 2**20:.0f} MiB of weights in huge pages"
        return remark

    def release(self) -> None:
        """Give the memory of the static backbone back."""
        if self._backbone is not None:
            self._backbone.release()
        self._backbone = None

    def speak(self, *args: Any, **kwargs: Any) -> Tensor:
        """Speech tokens (1, n) int64 as ``T3.inference`` (the stop token included) or ``inference_turbo`` (without)."""
        with torch.inference_mode():
            (tokens,) = self.run([self.request(*args, **kwargs)])
        return tokens

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], slots: int | None = None) -> list[Tensor]:
        """Speech tokens (1, n) int64 of each request; ``slots``: how many run at once."""
        if self._backbone is None and len(requests) > 1:  # upstream's analyzer knows one text at a time
            return [tokens for request in requests for tokens in self.run([request])]
        device, total = self._t3.device, sum(request.limit for request in requests)
        advance, finish = _progress(self._section, total)
        ids: list[list[int]] = [[] for _ in requests]
        ends: dict[int, tuple[str, int]] = {}
        try:
            for token in self._loop(requests).generate(requests, slots):
                if token.id is not None:
                    ids[token.request].append(token.id)
                    advance(sum(map(len, ids)))
                if token.end is not None:
                    ends[token.request] = (token.end, token.reasons)
        finally:
            finish()
            if self._backbone is not None and device.type == "cpu":
                self._backbone.release()  # or it would lie beside what the audio needs
        for number, request in enumerate(requests):
            _tell(request, len(ids[number]), *ends[number])
            if not self._llama and ids[number][-1:] == [upstream_t3.stop_token(self._t3)]:
                ids[number].pop()  # inference_turbo returns speech without it
        return [torch.tensor([row], dtype=torch.long, device=device) for row in ids]

    @torch.inference_mode()
    def logits(self, request: Request, tokens: Sequence[int]) -> Tensor:
        """Logits (n, V) fp32 after guidance that precede each of n given tokens (teacher forcing)."""
        loop = self._loop([request])
        rows, rest = request.embeds.size(0), len(tokens) - 1
        weight = torch.tensor([[request.knobs.guidance]], device=request.embeds.device)
        loop.backbone.begin(1, rows)
        each = [loop.backbone.admit([request.embeds], [rest + 1])]
        for index, token in enumerate(tokens[:-1]):
            embeds = loop.vocabulary.embed(torch.tensor([[token]], device=weight.device), [index + 1])
            each.append(loop.backbone.step(embeds.expand(rows, -1))[0].clone())
        return torch.cat([guide(row[None].float(), weight) for row in each])

    def _loop(self, requests: Sequence[Request]) -> Loop:
        t3 = self._t3
        vocabulary = Vocabulary(
            upstream_t3.start_token(t3),
            upstream_t3.stop_token(t3),
            lambda ids, at: upstream_t3.embed_tokens(t3, ids, at),
        )
        procedure = GUIDED if self._llama else UNGUIDED
        if self._backbone is None:
            maps = upstream_t3.needs_attention_maps(t3)
            backbone = TransformersBackbone(upstream_t3.backbone(t3), upstream_t3.head(t3), maps)
            # its hooks see the prefill, so it is built before; and one analyzer knows one text
            analyzer = build_analyzer(t3, *requests[0].text) if requests[0].text else None
            return Loop(backbone, procedure, vocabulary, analyzer and UpstreamAnalysis(analyzer))
        if t3_weights.addresses(t3) != self._addresses:  # somebody moved or cast the weights after apply
            self.prepare()
        analysis = AlignmentAnalysis(vocabulary.stop, t3.device) if self._watch else None
        return Loop(self._backbone, procedure, vocabulary, analysis, LAG if t3.device.type == "cuda" else 0)

    def _guided_request(
        self,
        *,
        t3_cond: Any,
        text_tokens: Tensor,
        initial_speech_tokens: Tensor | None = None,
        prepend_prompt_speech_tokens: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repetition_penalty: float = 1.2,
        cfg_weight: float = 0.5,
        generator: Generator | None = None,
        **unused: Any,  # num_return_sequences, stop_on_eos, do_sample, length_penalty: upstream reads none of them
    ) -> Request:
        """The arguments of ``T3.inference``. Without guidance (``cfg_weight`` 0) one row is decoded, not two."""
        if prepend_prompt_speech_tokens is not None:
            what = "prepend_prompt_speech_tokens is not supported."
            raise InvalidRequestError(what, "Upstream has no such code either.")
        cfg_weight = arguments.number("cfg_weight", cfg_weight)
        rows = 2 if cfg_weight > 0.0 else 1
        text_tokens = upstream_t3.check_text(self._t3, text_tokens)
        if text_tokens.size(0) < rows:
            raise InvalidRequestError(
                f"cfg_weight is {cfg_weight}, but the text has one row.", "Guidance needs the text twice.", "Repeat it."
            )
        text_tokens = text_tokens[:rows]
        embeds, start = upstream_t3.prefix(self._t3, t3_cond, text_tokens, cfg_weight, initial_speech_tokens)
        return Request(
            embeds=embeds,
            knobs=SamplingParameters(temperature, repetition_penalty, min_p, top_p, guidance=cfg_weight),
            limit=self._limit(max_new_tokens, embeds.size(1)),
            text=(start, text_tokens.size(1)),
            generator=generator,
        )

    def _unguided_request(
        self,
        t3_cond: Any,
        text_tokens: Tensor,
        temperature: float = 0.8,
        top_k: int = 1000,
        top_p: float = 0.95,
        repetition_penalty: float = 1.2,
        max_gen_len: int = 1000,
        generator: Generator | None = None,
    ) -> Request:
        """The arguments of ``T3.inference_turbo``."""
        if arguments.number("temperature", temperature) == 0.0 and self._backbone is None:
            temperature = 1.0  # upstream leaves the logits alone at 0, and its tokens are promised
        embeds, _ = upstream_t3.prefix(self._t3, t3_cond, text_tokens, cfg_weight=0.0)
        return Request(
            embeds=embeds,
            knobs=SamplingParameters(temperature, repetition_penalty, top_p=top_p, top_k=top_k),
            # upstream counts from the second token
            limit=self._limit(arguments.whole("max_gen_len", max_gen_len) + 1, embeds.size(1)),
            generator=generator,
        )

    def _limit(self, asked: int | None, prefix: int) -> int:
        capacity = upstream_t3.token_capacity(self._t3) - (0 if self._llama else prefix)
        limit = self._section.max_new_tokens or (
            capacity if asked is None else arguments.whole("max_new_tokens", asked)
        )
        if limit < 1:
            raise InvalidRequestError(f"max_new_tokens is {limit}, but must be at least 1.")
        if capacity < 1:
            raise InvalidRequestError(
                f"The voice and text take {prefix} positions, and the model has no more.", "", "Shorten the text."
            )
        return min(limit, capacity)


def _tell(request: Request, count: int, end: str, reasons: int) -> None:
    """Warn of speech that ended otherwise than by the model's own will."""
    if not count:
        raise DecodingError("No token can be drawn at step 0.", "Every id is excluded.", "Loosen top_k and top_p.")
    if end == "limit":
        _warn(
            f"Speech was cut at {request.limit} tokens ({request.limit / TOKENS_PER_SECOND:.1f} s) before the model "
            "ended it. Shorten the text, or raise decoding.max_new_tokens."
        )
    elif end == "exhausted":
        _warn(f"Speech was cut at {count} tokens: every id was excluded. Loosen top_k and top_p.")
    elif reasons:
        logger.warning("Speech was ended after %d tokens: %s.", count, ", ".join(describe(reasons)))


def _warn(message: str) -> None:
    warnings.warn(message, SpeechTruncatedWarning, stacklevel=2)


def _progress(section: DecodingSection, limit: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A function to call with the tokens so far, and one to call at the end."""
    if callable(section.progress):
        return lambda count: section.progress(count, limit), lambda: None
    if section.progress == "off":
        return lambda count: None, lambda: None
    from tqdm import tqdm

    bar = tqdm(total=limit, desc="Sampling", dynamic_ncols=True)
    return lambda count: bar.update(), bar.close
