"""Upstream's Transformers backbone as the token loop's ``Backbone``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TransformersBackbone:
    """Runs a Llama or GPT-2 of Transformers with its own growing cache.

    Against upstream's backend: not rebuilt for every call (and so not registered as a submodule of T3), no
    hidden states of every layer, and the head on the last position of the prefill only.

    Args:
        model: takes ``inputs_embeds`` (R, S, D), ``past_key_values`` and ``use_cache``.
        head: hidden state (R, 1, D) to logits (R, 1, V).
        attention_maps: ask for attention maps, where that decides which kernel runs.
    """

    def __init__(self, model: nn.Module, head: nn.Module, attention_maps: bool = False):
        self.model, self.head = model, head
        self._options = {"output_attentions": True} if attention_maps else {}

    def prefill(self, embeds: Tensor) -> tuple[Tensor, Any]:
        """(R, P, D) to logits (R, V) of the last position, and the cache."""
        return self.step(embeds, None)

    def step(self, embeds: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(R, S, D) to logits (R, V) of the last position, and the cache grown by S positions."""
        output = self.model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True, return_dict=True, **self._options
        )
        return self.head(output.last_hidden_state[:, -1:])[:, -1], output.past_key_values
