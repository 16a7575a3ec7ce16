"""The stages of an utterance in order, for one or for several at once.

``generate`` is ``Pipeline.generate``: one utterance through upstream's own functions, with whatever passes have put
there. Several go stage by stage through what computes whole batches (``passes.base.Engines``); each draws the random
numbers that it would draw alone. Where each stage begins is in ``upstream/stages.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidRequestError, brief
from ..passes.base import Call, Engines, Scope
from ..runtime import forks
from ..runtime.arguments import whole
from ..upstream.families import Parts
from ..upstream.stages import Stages
from ..upstream.warmup import copy_voice, voice_attribute
from .utterance import Draws, Utterance

FRAMES_PER_TOKEN = 2


class Pipeline:
    """The way of utterances through one model; the caller holds the model's lock.

    Args:
        voices: an item of a batch to the same one with conditionals in place of a voice's name.
        arguments: each gets name and value of every argument of a request, and returns what is to be in its place.
        scopes: what surrounds the last stage.
        alone: why flow matching cannot be given inputs of this package's making (``upstream.flow_inputs``), so that
            audio is made one utterance after the other, and not in windows; or an empty string.
        slots: utterances at once that a memory budget was planned for; ``None`` without one.
    """

    def __init__(
        self,
        parts: Parts,
        stages: Stages,
        engines: Engines,
        voices: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
        arguments: Sequence[Callable[[str, Any], Any]] = (),
        scopes: Sequence[Scope] = (),
        alone: str = "",
        slots: int | None = None,
    ):
        self.parts, self.stages, self.engines, self.slots = parts, stages, engines, slots
        self._voices, self._arguments, self._scopes = voices, arguments, scopes
        self.alone, self._attribute = alone, voice_attribute(parts)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Marked samples (1, m) float32 on the host; arguments, random numbers and result are upstream's."""
        given = self.stages.bind(args, kwargs)
        return self.spoken(given, self.stages.condition(given))

    def spoken(self, given: dict[str, Any], voice: Any) -> Tensor:
        """As ``generate``, of arguments by name with the voice that they have led to."""
        stages = self.stages
        asked = stages.ask(given, voice)
        with torch.inference_mode():
            tokens = stages.spoken(stages.decode(asked))
            mel = stages.frames(tokens, stages.voice_reference(voice))
            marked = stages.mark(stages.samples(mel), tokens.size(-1))
        return torch.from_numpy(marked).unsqueeze(0)  # out of inference mode: the caller may go on with it

    @property
    def unaligned(self) -> str:
        """Why words have no times; empty where they have."""
        engine = self.engines.token_model
        return "the decoding pass does not run" if engine is None else engine.unaligned

    def utterance(self, number: int, item: Any) -> Utterance:
        """An item of a batch with its voice, which is its own: neither the model's nor the caller's is changed.

        Args:
            item: keyword arguments of ``generate``, and optionally ``seed`` (drawn from the global generator where it
                is missing) and ``voice`` (a name, or conditionals; the model's own where it is missing).

        Raises:
            InvalidRequestError: the item is no mapping, or has neither text nor voice.
        """
        own = self.parts.voice
        subject = self.stages.subject
        if not isinstance(item, Mapping) or (subject == "text" and not isinstance(item.get(subject), str)):
            raise InvalidRequestError(
                f"Item {number} of the batch is {brief(item)}.",
                f"It must be a dict with a{'n' * (subject == 'audio')} {subject}.",
                f'Pass {{"{subject}": "...", ...}}.',
            )
        item = self._voices(item)
        voice, seed = item.get("voice", own), item.get("seed")
        if voice is None and item.get(self.stages.reference) is None:
            raise InvalidRequestError(
                f"Item {number} of the batch has no voice.",
                "The model has no conditionals yet.",
                "Pass audio_prompt_path or voice, or call prepare_conditionals first.",
            )
        call = Call((), {name: value for name, value in item.items() if name not in ("seed", "voice")})
        for look in self._arguments:
            call.rewrite((), look)
        given = self.stages.bind((), call.kwargs)
        # drawn from the global generator, so that torch.manual_seed before the batch repeats it
        seed = int(torch.randint(2**62, ())) if seed is None else whole("seed", seed)
        with forks.undoing(partial(setattr, self.parts.model, self._attribute, own)):
            setattr(self.parts.model, self._attribute, copy_voice(voice))
            voice = self.stages.condition(given)
        return Utterance(number, given, voice, Draws(self.parts.device, seed))

    def request(self, utterance: Utterance) -> Any:
        """What T3 is asked for (``runtime.t3.requests.Request``), with a generator of the utterance's own."""
        asked = self.stages.ask(utterance.given, utterance.voice)
        with torch.inference_mode():
            request = self.engines.token_model.request(**asked, generator=utterance.draws.generator())
        if utterance.timed and not self.unaligned:
            request.aligned, utterance.spelling = True, self.stages.spelling(asked)
        return request

    def decode(self, utterances: Sequence[Utterance], slots: int | None = None, told: bool = True) -> None:
        """Speech tokens of several utterances in a batch of at most ``slots``; ``told``: as for ``TokenModel.run``.

        One after the other by upstream's loop where the decoding pass does not run.
        """
        engine = self.engines.token_model
        if engine is None:
            for utterance in utterances:
                asked = self.stages.ask(utterance.given, utterance.voice)
                with utterance.draws.own(), torch.inference_mode():
                    utterance.tokens = self.stages.spoken(self.stages.decode(asked))
            return
        requests = [self.request(utterance) for utterance in utterances]
        for utterance, request in zip(utterances, requests, strict=True):
            request.limit = min(request.limit, utterance.limit or request.limit)
        results = engine.run(requests, slots, told)
        found = zip(utterances, requests, results, engine.ends, engine.attention, strict=True)
        for utterance, request, tokens, end, attention in found:
            utterance.draws.resume(request.generator)
            utterance.end = end
            with torch.inference_mode():
                utterance.tokens = self.stages.spoken(tokens)
            if attention is not None:
                last = tokens.size(-1) - (end == "stop")
                utterance.attention = attention[last - utterance.tokens.size(-1) : last]
        engine.attention = []

    def alike(self, utterances: Sequence[Utterance]) -> Iterator[list[Utterance]]:
        """Those whose audio is made together: of similar length, as many as flow matching takes with their padding."""
        if not self._together:
            yield from ([utterance] for utterance in utterances)
            return
        frames, some = self.engines.flow.batch_frames(), []
        for utterance in sorted(utterances, key=self._frames):
            if some and ((len(some) + 1) * self._frames(utterance) > frames or len(some) == self.slots):
                yield some
                some = []
            some.append(utterance)
        if some:
            yield some

    @property
    def _together(self) -> bool:
        """Whether the audio of several utterances can be made at once."""
        return not self.alone and self.engines.flow is not None and self.engines.vocoder is not None

    def _frames(self, utterance: Utterance) -> int:
        prompt = self.stages.voice_reference(utterance.voice)["prompt_token"]
        return FRAMES_PER_TOKEN * (utterance.tokens.size(-1) + prompt.size(-1))

    @torch.inference_mode()
    def sound(self, utterances: Sequence[Utterance]) -> list[Tensor]:
        """Samples (1, m) of several utterances with tokens, not marked yet."""
        return [self.stages.faded(samples) for _, samples in self.acoustics(utterances)]

    @torch.inference_mode()
    def acoustics(self, utterances: Sequence[Utterance]) -> list[tuple[Tensor, Tensor]]:
        """Mel frames (1, 80, T) and what the vocoder makes of them, (1, 480 T): neither faded in nor marked."""
        flow, vocoder, stages = self.engines.flow, self.engines.vocoder, self.stages
        if len(utterances) == 1 or not self._together:
            return [self._alone(utterance) for utterance in utterances]
        inputs = [flow.inputs(one.tokens, stages.voice_reference(one.voice)) for one in utterances]
        noises = []
        for utterance, some in zip(utterances, inputs, strict=True):
            with utterance.draws.own():
                noises.append(flow.draw(some))
        mels = [stages.in_format(mel) for mel in flow.mels(inputs, noises, stages.steps())]
        sources = []
        for utterance, mel in zip(utterances, mels, strict=True):
            with utterance.draws.own():
                sources.append(vocoder.source(mel))
        return list(zip(mels, vocoder.speak_all(mels, sources), strict=True))

    def _alone(self, utterance: Utterance) -> tuple[Tensor, Tensor]:
        with utterance.draws.own():
            mel = self.stages.frames(utterance.tokens, self.stages.voice_reference(utterance.voice))
            return mel, self.stages.vocode(mel)

    def complete(self, utterance: Utterance, samples: Tensor) -> Tensor:
        """Marked samples (1, m) on the host of samples (1, n), with the scopes of passes around it."""
        call = Call((), utterance.given)
        with ExitStack() as stack:
            for scope in self._scopes:
                stack.enter_context(scope(call))
            with torch.inference_mode():
                marked = self.stages.mark(samples, utterance.tokens.size(-1))
            call.result = torch.from_numpy(marked).unsqueeze(0)
            stack.close()  # a scope may replace the result
        return call.result
