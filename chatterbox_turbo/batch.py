"""Several utterances at once: their tokens in one continuous batch, their audio one after the other.

Upstream's own ``generate`` runs twice for each utterance: up to the call of T3, whose arguments become a request, and
again with the tokens in hand. What it does around T3 (text, voice, filters, watermark) stays upstream's, whatever the
release, and each utterance draws the random numbers that it would draw alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from .errors import DecodingError, InvalidRequestError
from .passes.decoding import TokenModel
from .runtime.token_loop import Request
from .upstream.families import Parts
from .upstream.warmup import copy_voice, voice_attribute


@dataclass
class _Item:
    """One utterance between its two runs."""

    arguments: dict[str, Any]
    seed: int
    voice: Any = None
    request: Request | None = None
    host_state: Tensor | None = None  # of the CPU's generator, where T3 draws from another one


class _Captured(BaseException):
    """Leaves ``generate`` at the call of T3; no ``except Exception`` on the way holds it up."""


def speak_batch(
    parts: Parts, model: TokenModel, items: Sequence[Mapping[str, Any]], slots: int | None = None
) -> list[Tensor]:
    """The samples (1, m) of each utterance, in order; the caller holds the model's lock.

    Args:
        items: keyword arguments of ``generate``, and optionally ``seed``, and ``voice``: conditionals to use instead
            of the model's own.
        slots: utterances in the batch at once; all where it is ``None``.

    Raises:
        InvalidRequestError: an item is no mapping, or has neither text nor voice; nothing has been generated then.
        DecodingError: the model does not decode by ``model`` any more.
    """
    attribute = voice_attribute(parts)
    own = parts.voice
    made = [_item(number, item, own) for number, item in enumerate(items)]
    cuda = [parts.device] if parts.device.type == "cuda" else []
    results = []
    with torch.random.fork_rng(cuda):
        try:
            for item in made:
                _capture(parts, model, item, attribute)
            tokens = model.run([item.request for item in made], slots)
            for item, ids in zip(made, tokens, strict=True):
                setattr(parts.model, attribute, item.voice)
                _set_states(parts.device, item)
                with model.diverted(lambda *args, ids=ids, **kwargs: ids):
                    results.append(parts.model.generate(**item.arguments))
        finally:
            setattr(parts.model, attribute, own)
    return results


def _item(number: int, item: Any, own: Any) -> _Item:
    if not isinstance(item, Mapping) or not isinstance(item.get("text"), str):
        raise InvalidRequestError(
            f"Item {number} of the batch is {item!r}.", "It must be a dict with a text.", 'Pass {"text": "...", ...}.'
        )
    arguments = {key: value for key, value in item.items() if key not in ("seed", "voice")}
    voice = item.get("voice", own)
    if voice is None and not arguments.get("audio_prompt_path"):
        raise InvalidRequestError(
            f"Item {number} of the batch has no voice.",
            "The model has no conditionals yet.",
            "Pass audio_prompt_path or voice, or call prepare_conditionals first.",
        )
    seed = item.get("seed")
    # drawn from the global generator, so that torch.manual_seed before the batch repeats it
    return _Item(arguments, int(torch.randint(2**62, ())) if seed is None else seed, voice)


def _capture(parts: Parts, model: TokenModel, item: _Item, attribute: str) -> None:
    """Run ``generate`` up to T3: the request, with a generator as the global one is there, and the voice."""
    setattr(parts.model, attribute, copy_voice(item.voice))
    torch.manual_seed(item.seed)

    def capture(*args: Any, **kwargs: Any) -> Tensor:
        generator = Generator(parts.device)
        cuda = parts.device.type == "cuda"
        generator.set_state(torch.cuda.get_rng_state(parts.device) if cuda else torch.get_rng_state())
        item.host_state = torch.get_rng_state()
        with torch.inference_mode():
            item.request = model.request(*args, **kwargs, generator=generator)
        raise _Captured

    try:
        with model.diverted(capture):
            parts.model.generate(**item.arguments)
    except _Captured:
        pass
    if item.request is None:
        raise DecodingError(
            "generate ended without a call of T3.", "The decoding pass is not in place (reverted?).", "Apply it again."
        )
    item.voice = getattr(parts.model, attribute)
    item.arguments.pop("audio_prompt_path", None)  # encoded by now


def _set_states(device: torch.device, item: _Item) -> None:
    """The global generators as they are after T3 in a run alone."""
    torch.set_rng_state(item.host_state)
    state = item.request.generator.get_state()
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
