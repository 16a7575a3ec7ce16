"""The sizes upstream's constructors build, without a change to upstream's files."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

SIZES = ("tiny", "full")

SHALLOW = "shallow"
"""T3 of the full width with a few layers, and all else tiny: the full size to what compiles and measures a step."""

PROMPT_TOKENS = 25
"""Speech tokens of the T3 prompt of a tiny model: 1 s at 25 tokens/s (full: 150, Turbo 375)."""

# By the backbone's `model_type`; heads of 64 as upstream's. Upstream's alignment analyzer reads the attention of
# layers 9, 12 and 13, heads 2, 11 and 15. `vocab_size` is a token embedding of the backbone that upstream never reads.
_TINY_T3: dict[str, dict[str, Any]] = {
    "llama": dict(num_hidden_layers=2, hidden_size=256, num_attention_heads=4, intermediate_size=128),
    "multilingual": dict(num_hidden_layers=14, hidden_size=512, head_dim=32, intermediate_size=128),
    "gpt2": dict(
        n_layer=2, hidden_size=256, n_embd=256, n_head=4, n_inner=256, vocab_size=8, n_positions=2048, n_ctx=2048
    ),
}

_SHALLOW_T3: dict[str, dict[str, Any]] = {
    "llama": dict(num_hidden_layers=3),
    "multilingual": dict(num_hidden_layers=14),
    "gpt2": dict(n_layer=3),
}

_GPT2_TEXT_VOCABULARY = 512
"""Rows of a tiny GPT-2 model's text embedding; the synthetic tokenizer emits ids below 256."""

# Constructor arguments of S3Gen's parts, by their names in `chatterbox.models.s3gen.s3gen`.
_TINY_S3GEN: dict[str, dict[str, Any]] = {
    "CAMPPlus": dict(growth_rate=8, bn_size=2, init_channels=32),
    "UpsampleConformerEncoder": dict(num_blocks=1, linear_units=128),
    "ConditionalDecoder": dict(channels=[64], num_heads=2, n_blocks=1, num_mid_blocks=1),
    "HiFTGenerator": dict(base_channels=64),
    "ConvRNNF0Predictor": dict(cond_channels=64),
}


@contextmanager
def architecture(size: str) -> Iterator[None]:
    """Make upstream's constructors build models of one size, until the block ends.

    `with architecture("tiny"): ChatterboxTTS.from_local(folder, "cpu")` loads a tiny checkpoint. "full" leaves
    every size alone. Either keeps `MTLTokenizer` from the network: upstream fetches a Cangjie table and a word
    segmenter's model at construction, and raises `ConnectionError` where there is none; such a tokenizer passes
    Chinese text through unsegmented. Everything patched is restored at the end, exceptions included.

    Raises `ValueError` for a size that is neither in `SIZES` nor `SHALLOW`.
    """
    if size not in (*SIZES, SHALLOW):
        raise ValueError(f"Unknown size {size!r}: a synthetic model is one of {', '.join(SIZES)}. Pass one of these.")
    with ExitStack() as patches:
        _keep_tokenizer_offline(patches)
        if size != "full":
            _shrink_t3(patches, _TINY_T3 if size == "tiny" else _SHALLOW_T3)
            _shrink_s3gen(patches)
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set `owner.name` and put back what `owner` itself held, or nothing where it had inherited the name."""
    inherited, old = name not in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, old)


def _keep_tokenizer_offline(patches: ExitStack) -> None:
    tokenizers = importlib.import_module("chatterbox.models.tokenizers.tokenizer")
    converter = getattr(tokenizers, "ChineseCangjieConverter", None)  # absent before upstream's 0.1.3
    if converter is not None:
        patches.enter_context(replaced(converter, "_load_cangjie_mapping", lambda self, model_dir=None: None))
        patches.enter_context(replaced(converter, "_init_segmenter", lambda self: None))


def _shrink_t3(patches: ExitStack, sizes: dict[str, dict[str, Any]]) -> None:
    t3 = importlib.import_module("chatterbox.models.t3.t3")
    config = importlib.import_module("chatterbox.models.t3.modules.t3_config")
    conditioning = importlib.import_module("chatterbox.models.t3.modules.cond_enc")
    original, perceiver = t3.T3.__init__, conditioning.Perceiver
    alone = threading.Lock()  # models that load at once share the dictionary of sizes

    @functools.wraps(original)
    def init(self: Any, hp: Any = None) -> None:
        hp = config.T3Config() if hp is None else hp
        with alone:
            build(self, hp)

    def build(self: Any, hp: Any) -> None:
        entry = t3.LLAMA_CONFIGS[hp.llama_config_name]
        kind = "multilingual" if getattr(hp, "is_multilingual", False) else entry["model_type"]
        tiny = {**entry, **sizes[kind]}
        if kind != "gpt2":
            tiny["num_key_value_heads"] = tiny["num_attention_heads"]
        else:
            hp.text_tokens_dict_size = _GPT2_TEXT_VOCABULARY
        hp.speech_cond_prompt_len = PROMPT_TOKENS
        t3.LLAMA_CONFIGS[hp.llama_config_name] = tiny
        width = tiny["hidden_size"]
        tiny["initializer_range"] = 0.02 * (1024 / width) ** 0.5  # so that layers add as much to a channel at any width
        # upstream's perceiver knows of 1024 channels only
        conditioning.Perceiver = functools.partial(perceiver, pre_attention_query_size=width, embedding_dim=width)
        try:
            original(self, hp)
        finally:
            t3.LLAMA_CONFIGS[hp.llama_config_name], conditioning.Perceiver = entry, perceiver

    patches.enter_context(replaced(t3.T3, "__init__", init))


def _shrink_s3gen(patches: ExitStack) -> None:
    s3gen = importlib.import_module("chatterbox.models.s3gen.s3gen")
    speech_tokenizer = importlib.import_module("s3tokenizer.model_v2").S3TokenizerV2
    for name, sizes in _TINY_S3GEN.items():
        patches.enter_context(replaced(s3gen, name, _with_sizes(getattr(s3gen, name), sizes)))
    original = speech_tokenizer.__init__
    default = original.__defaults__[0]

    @functools.wraps(original)
    def init(self: Any, name: str, config: Any = default) -> None:
        # A copy: upstream shares one mutable default among all tokenizers. Heads of 64 suit its rotary table.
        original(self, name, dataclasses.replace(config, n_audio_layer=1, n_audio_state=128, n_audio_head=2))

    patches.enter_context(replaced(speech_tokenizer, "__init__", init))


def _with_sizes(part: Callable[..., Any], sizes: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(part)
    def construct(*args: Any, **kwargs: Any) -> Any:
        module = part(*args, **{**kwargs, **sizes})
        if hasattr(module, "up_encoders"):  # four of them, in no argument
            module.up_encoders = module.up_encoders[:1]
        return module

    return construct
