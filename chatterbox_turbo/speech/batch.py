"""Several utterances at once: their tokens in one continuous batch, their audio in batches of similar length.

A text that is too long to be said at once is said in pieces, after the others of its wave. Where the stages of a
model's ``generate`` are not known, one after the other by that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidRequestError, brief
from ..runtime import forks
from ..runtime.arguments import whole
from ..runtime.device import random_state
from ..text import Piece
from ..upstream.families import Parts
from ..upstream.warmup import copy_voice, voice_attribute
from .long_text import LongText, Spoken
from .pipeline import Pipeline
from .times import TimedSpeech, sentences, times_of
from .utterance import Utterance

WAVES = 4  # utterances in reach for each place in T3's batch, so that few places are empty for long

Result = tuple[int, "Tensor | TimedSpeech | Exception"]


def speak_batch(
    pipeline: Pipeline,
    items: Iterable[Any],
    slots: int | None,
    together: int | None,
    raising: bool,
    timed: bool = False,
) -> Iterator[Result]:
    """(number, samples (1, m)) of each utterance as they are finished; the caller holds the model's lock meanwhile.

    Args:
        items: keyword arguments of ``generate``, and optionally ``seed`` and ``voice``; read as they are needed.
        slots: utterances in T3's batch at once; all that are in reach where it is ``None``.
        together: utterances in reach at once, which bounds memory; all of them where it is ``None``.
        raising: the first failure ends everything; otherwise it takes the place of the samples.
        timed: with the times of words and sentences (``TimedSpeech``) in place of samples.
    """
    rest = enumerate(items)
    reader = None if pipeline.engines.text is None else LongText(pipeline, timed)
    while wave := list(islice(rest, together)):
        utterances, failed, long = [], {}, []
        for number, item in wave:
            try:
                utterance = pipeline.utterance(number, item)
                utterance.timed = timed
                pieces = [] if reader is None else reader.needed(utterance.given)
                if len(pieces) == 1:
                    utterance.given["text"] = pieces[0].text
                long += [(utterance, pieces)] if len(pieces) > 1 else []
                utterances += [utterance] if len(pieces) < 2 else []
            except Exception as error:
                if raising:
                    raise
                failed[number] = error
        failed |= _decode(pipeline, utterances, slots, raising)
        yield from failed.items()
        spoken = [utterance for utterance in utterances if utterance.number not in failed]
        for some in pipeline.alike(spoken):
            yield from _sound(pipeline, some, raising)
        for utterance, pieces in long:
            yield utterance.number, _said(pipeline, reader, utterance, pieces, raising)


def _said(
    pipeline: Pipeline, reader: LongText, utterance: Utterance, pieces: Sequence[Piece], raising: bool
) -> Tensor | TimedSpeech | Exception:
    heard: list[dict[str, Any]] = []
    rate = pipeline.parts.model.sr

    def noted(said: Iterable[Spoken]) -> Iterator[Spoken]:
        for one in said:
            count = len(one.samples) + int(one.piece.pause * rate)
            heard.append({"text": one.piece.text, "samples": count, "pause": one.piece.pause, "words": one.words})
            yield one

    try:
        with utterance.draws.own():
            seed = int(torch.randint(2**62, ()))  # as ``generate`` does
        said = reader.say(pieces, utterance.given, utterance.voice, seed)
        samples = torch.cat(list(reader.sound(noted(said))))[None]
        return _timed(samples, heard, rate, utterance) if utterance.timed else samples
    except Exception as error:
        if raising:
            raise
        return error


def _timed(samples: Tensor, heard: Sequence[Mapping[str, Any]], rate: int, utterance: Utterance) -> TimedSpeech:
    return TimedSpeech(samples, tuple(sentences(heard, rate, utterance.given.get("language_id"))), rate)


def _decode(
    pipeline: Pipeline, utterances: Sequence[Utterance], slots: int | None, raising: bool
) -> dict[int, Exception]:
    if not utterances:
        return {}
    if raising:
        pipeline.decode(utterances, slots)
        return {}
    before = [utterance.draws.states for utterance in utterances]
    with suppress(Exception):
        pipeline.decode(utterances, slots)
        return {}
    failed = {}  # who it is, only each alone tells
    for utterance, states in zip(utterances, before, strict=True):
        utterance.draws.states = states
        try:
            pipeline.decode([utterance])
        except Exception as error:
            failed[utterance.number] = error
    return failed


def _sound(pipeline: Pipeline, some: Sequence[Utterance], raising: bool) -> Iterator[Result]:
    before = [utterance.draws.states for utterance in some]
    try:
        waves: Sequence[Tensor | None] = pipeline.sound(some)
    except Exception:
        if raising:
            raise
        waves = [None] * len(some)
    for utterance, samples, states in zip(some, waves, before, strict=True):
        try:
            if samples is None:
                utterance.draws.states = states
                (samples,) = pipeline.sound([utterance])
            wav = pipeline.complete(utterance, samples)
            if not utterance.timed:
                yield utterance.number, wav
                continue
            text, rate, count = utterance.given["text"], pipeline.parts.model.sr, wav.size(1)
            heard = {"text": text, "samples": count, "pause": 0.0, "words": times_of(utterance, count, rate)}
            yield utterance.number, _timed(wav, [heard], rate, utterance)
        except Exception as error:
            if raising:
                raise
            yield utterance.number, error


def one_by_one(
    parts: Parts, items: Iterable[Any], voices: Callable[[Mapping[str, Any]], Mapping[str, Any]], raising: bool
) -> Iterator[Result]:
    """(number, samples (1, m)) by the model's own ``generate``, whose code is not known.

    ``voices``: as for ``Pipeline``.
    """
    for number, item in enumerate(items):
        try:
            result: Tensor | Exception = _generated(parts, number, voices(item) if isinstance(item, Mapping) else item)
        except Exception as error:
            if raising:
                raise
            result = error
        yield number, result


def _generated(parts: Parts, number: int, item: Any) -> Tensor:
    if not isinstance(item, Mapping):
        raise InvalidRequestError(
            f"Item {number} of the batch is {brief(item)}.", "It must be a dict.", 'Pass {"text": "...", ...}.'
        )
    arguments = {name: value for name, value in item.items() if name not in ("seed", "voice")}
    attribute, own, seed = voice_attribute(parts), parts.voice, item.get("seed")
    seed = int(torch.randint(2**62, ())) if seed is None else whole("seed", seed)
    with forks.undoing(partial(setattr, parts.model, attribute, own)), random_state.kept(parts.device):
        setattr(parts.model, attribute, copy_voice(item.get("voice", own)))
        random_state.seed(parts.device, seed)
        return parts.model.generate(**arguments)
