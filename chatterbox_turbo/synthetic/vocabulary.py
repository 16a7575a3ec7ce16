"""Tokenizer files of the shapes upstream reads, made from characters alone (no merges)."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

_START, _STOP = 255, 0
_GPT2_LENGTH = 50276
_GPT2_END_OF_TEXT = 50256

# Lower-case scripts of upstream's 23 languages after NFKD, beside ASCII and Latin-1.
_SCRIPTS = (
    (0x0300, 0x036F), (0x0370, 0x03FF), (0x0400, 0x045F), (0x05B0, 0x05EA), (0x0620, 0x0652), (0x0900, 0x096F),
    (0x1100, 0x11FF), (0x3000, 0x30FF),
)  # fmt: skip


def write_grapheme_tokenizer(path: Path, size: int, languages: tuple[str, ...] = ()) -> None:
    """Write the tokenizer of the Llama families: one id a character, `[START]` = 255, `[STOP]` = 0.

    `size`: ids in all, at most the rows of T3's text embedding. `languages`: codes that get a `[xx]` token each.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    special = ["[UNK]", "[SPACE]", *(f"[{code}]" for code in languages)]
    codes = [*range(33, 127), *range(161, 256)]
    if languages:
        codes += [code for first, last in _SCRIPTS for code in range(first, last + 1)]
    characters = [chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"]
    names = [*special, *characters]
    names += [f"[unused_{number}]" for number in range(size - 2 - len(names))]
    names.insert(_STOP, "[STOP]")
    names.insert(_START, "[START]")
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[STOP]", "[START]", *special])
    tokenizer.save(str(path))


def write_gpt2_tokenizer(folder: Path) -> None:
    """Write the Hugging Face tokenizer folder of the GPT-2 families: 50276 ids, of which text uses the 256 bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<|unused_{number}|>" for number in range(len(names), _GPT2_LENGTH)]
    names[_GPT2_END_OF_TEXT] = "<|endoftext|>"
    tokenizer = Tokenizer(BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 8196}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
