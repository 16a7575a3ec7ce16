"""Several utterances at once: their tokens in one continuous batch, their audio in batches of similar length.

Upstream's own ``generate`` runs several times for each utterance. A run ends at the first call whose answer is not
there yet (T3's loop, then the acoustic half and inside it encoder, solver and vocoder); the calls that all utterances
have come to are answered together, and the next run gets further. What upstream does between them (text, voice,
filters, watermark) stays upstream's, whatever the release, and each utterance draws the random numbers that it would
draw alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from ..errors import DecodingError, InvalidRequestError, brief
from ..passes.base import Arguments, Engines, Switch
from ..patching import Journal
from ..runtime.arguments import whole
from ..upstream.families import Parts
from ..upstream.warmup import copy_voice, voice_attribute

FRAMES_PER_TOKEN = 2
RandomState = tuple[Tensor, Tensor | None]  # of the host's generator, and of the CUDA device's


@dataclass
class _Utterance:
    """One item of a batch between its runs.

    ``calls``: arguments of each call that has been reached, with the random state there. ``answers``: what such a call
    returns, with the random state after it, or ``None`` where it draws nothing.
    """

    arguments: dict[str, Any]
    seed: int
    voice: Any = None
    calls: dict[str, tuple[Arguments, RandomState]] = field(default_factory=dict)
    answers: dict[str, tuple[Any, RandomState | None]] = field(default_factory=dict)


class _Reached(BaseException):
    """Leaves a run at a call without an answer; no ``except Exception`` on the way holds it up."""


def speak_batch(
    parts: Parts, engines: Engines, items: Sequence[Mapping[str, Any]], slots: int | None = None
) -> list[Tensor]:
    """The samples (1, m) of each utterance, in order; the caller holds the model's lock.

    Args:
        items: keyword arguments of ``generate``, and optionally ``seed``, and ``voice``: conditionals to use instead
            of the model's own.
        slots: utterances in T3's batch at once; all where it is ``None``.

    Raises:
        InvalidRequestError: an item is no mapping, or has neither text nor voice; nothing has been generated then.
        DecodingError: the model does not decode by ``engines`` any more.
    """
    own = parts.voice
    utterances = [_utterance(number, item, own) for number, item in enumerate(items)]
    cuda = [parts.device] if parts.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), _Batch(parts, engines) as batch:
        try:
            batch.decode(utterances, slots)
            if engines.flow is not None and engines.vocoder is not None:
                for some in _alike(utterances, engines.flow.batch_frames()):
                    batch.sound(some)
            return [batch.run(utterance) for utterance in utterances]
        finally:
            setattr(parts.model, voice_attribute(parts), own)


def _utterance(number: int, item: Any, own: Any) -> _Utterance:
    if not isinstance(item, Mapping) or not isinstance(item.get("text"), str):
        raise InvalidRequestError(
            f"Item {number} of the batch is {brief(item)}.",
            "It must be a dict with a text.",
            'Pass {"text": "...", ...}.',
        )
    arguments = {key: value for key, value in item.items() if key not in ("seed", "voice")}
    voice = item.get("voice", own)
    if voice is None and arguments.get("audio_prompt_path") is None:
        raise InvalidRequestError(
            f"Item {number} of the batch has no voice.",
            "The model has no conditionals yet.",
            "Pass audio_prompt_path or voice, or call prepare_conditionals first.",
        )
    seed = item.get("seed")
    # drawn from the global generator, so that torch.manual_seed before the batch repeats it
    return _Utterance(arguments, int(torch.randint(2**62, ())) if seed is None else whole("seed", seed), voice)


def _alike(utterances: Sequence[_Utterance], frames: int) -> Iterator[list[_Utterance]]:
    """Utterances of similar length, as many as have ``frames`` together with their padding."""

    def length(utterance: _Utterance) -> int:
        tokens, prompt = utterance.answers["t3"][0], utterance.voice.gen["prompt_token"]
        return FRAMES_PER_TOKEN * (tokens.size(-1) + prompt.size(-1))

    some: list[_Utterance] = []
    for utterance in sorted(utterances, key=length):
        if some and (len(some) + 1) * length(utterance) > frames:
            yield some
            some = []
        some.append(utterance)
    if some:
        yield some


class _Batch:
    """The runs of a batch's utterances, with the calls of the engines diverted."""

    def __init__(self, parts: Parts, engines: Engines):
        self._parts, self._engines = parts, engines
        self._attribute = voice_attribute(parts)
        self._switches: dict[str, Switch] = {"t3": engines.token_model.calls}
        self._journal, self._stack = Journal(), ExitStack()

    def __enter__(self) -> _Batch:
        flow, vocoder, s3gen = self._engines.flow, self._engines.vocoder, self._parts.s3gen
        if flow is not None and vocoder is not None:
            acoustic = Switch(s3gen.inference)
            self._stack.callback(self._journal.undo)
            self._journal.wrap(s3gen, "inference", lambda wrapped, instance, args, kwargs: acoustic(*args, **kwargs))
            self._switches |= {
                "acoustic": acoustic,
                "encoder": flow.encoder_calls,
                "solver": flow.solver_calls,
                "vocoder": vocoder.calls,
            }
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def decode(self, utterances: Sequence[_Utterance], slots: int | None) -> None:
        """Answer the calls of T3."""
        model, requests = self._engines.token_model, []
        for utterance in utterances:
            (args, kwargs), state = self._reach(utterance, "t3")
            utterance.voice = getattr(self._parts.model, self._attribute)
            utterance.arguments.pop("audio_prompt_path", None)  # encoded by now
            generator = Generator(self._parts.device)
            generator.set_state(state[0] if state[1] is None else state[1])
            with torch.inference_mode():
                requests.append(model.request(*args, **kwargs, generator=generator))
        for utterance, request, tokens in zip(utterances, requests, model.run(requests, slots), strict=True):
            host, cuda = utterance.calls["t3"][1]
            drawn = request.generator.get_state()
            utterance.answers["t3"] = tokens, (drawn, None) if cuda is None else (host, drawn)

    def sound(self, utterances: Sequence[_Utterance]) -> None:
        """Answer the calls of the acoustic half, and inside it those of encoder, solver and vocoder."""
        flow, vocoder = self._engines.flow, self._engines.vocoder
        for utterance in utterances:
            self._reach(utterance, "acoustic")
        for name, answer in (("encoder", flow.encode_all), ("solver", flow.solve_all)):
            calls = [self._reach(utterance, name)[0] for utterance in utterances]
            for utterance, result in zip(utterances, answer(calls), strict=True):
                utterance.answers[name] = result, None
        mels, sources, states = [], [], []
        for utterance in utterances:
            (args, kwargs), _ = self._reach(utterance, "vocoder")  # which leaves the generators as they are there
            sources.append(vocoder.source(*args, **kwargs))
            states.append(self._state())
            mels.append(kwargs["speech_feat"] if "speech_feat" in kwargs else args[0])
        for utterance, *result, state in zip(
            utterances, vocoder.speak_all(mels, sources), sources, states, strict=True
        ):
            utterance.answers["vocoder"] = tuple(result), state
            utterance.answers["acoustic"] = self._acoustic(utterance), self._state()
            for name in ("encoder", "solver", "vocoder"):
                del utterance.answers[name], utterance.calls[name]

    def run(self, utterance: _Utterance) -> Tensor:
        """``generate`` with the answers that are there."""
        setattr(self._parts.model, self._attribute, copy_voice(utterance.voice))
        self._seed(utterance.seed)
        return self._diverted(utterance, lambda: self._parts.model.generate(**utterance.arguments))

    def _acoustic(self, utterance: _Utterance) -> Any:
        """The acoustic half alone, from the arguments and the random state of its call."""
        (args, kwargs), state = utterance.calls["acoustic"]
        self._set_state(state)
        return self._diverted(utterance, lambda: self._parts.s3gen.inference(*args, **kwargs), inside="acoustic")

    def _reach(self, utterance: _Utterance, name: str) -> tuple[Arguments, RandomState]:
        """Arguments of the utterance's call of that name, with the random state there."""
        with suppress(_Reached):
            (self._acoustic if "acoustic" in utterance.calls else self.run)(utterance)
        if name not in utterance.calls:
            raise DecodingError(
                f"generate ended without a call of {'T3' if name == 't3' else f'the {name}'}.",
                "Its pass is not in place (reverted?).",
                "Apply it again.",
            )
        return utterance.calls[name]

    def _diverted(self, utterance: _Utterance, function: Callable[[], Any], inside: str = "") -> Any:
        def handler(name: str) -> Callable[..., Any]:
            def handle(*args: Any, **kwargs: Any) -> Any:
                if name not in utterance.answers:
                    utterance.calls[name] = (args, kwargs), self._state()
                    raise _Reached
                result, state = utterance.answers[name]
                if state is not None:
                    self._set_state(state)
                return result

            return handle

        with ExitStack() as stack:
            for name, switch in self._switches.items():
                if name != inside:
                    stack.enter_context(switch.diverted(handler(name)))
            return function()

    def _seed(self, seed: int) -> None:
        """``torch.manual_seed``, of no other device than the model's."""
        torch.default_generator.manual_seed(seed)
        device = self._parts.device
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)

    def _state(self) -> RandomState:
        device = self._parts.device
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _set_state(self, state: RandomState) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._parts.device)
