"""What the tokens of upstream's ``MTLTokenizer`` spell.

It lowers and decomposes its text, says Chinese characters by their Cangjie codes, Japanese ones in hiragana, and adds
vowel signs in Hebrew and stress in Russian (``models/tokenizers/tokenizer.py``). All of it is read from the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..text.words import HAN, UNKNOWN, Letter, folded

_SILENT = frozenset(("[START]", "[STOP]", "[SPACE]", "[PAD]", "[SEP]", "[CLS]", "[MASK]"))
_UNKNOWN = "[UNK]"
_CODE, _LAST_OF_CODE = "[cj_", "[cj_.]"


def spelled(tokens: Sequence[str], language: str | None) -> list[Letter]:
    """The letters that text tokens spell, in order; each begins and ends at a number of tokens from the first one.

    Args:
        tokens: as they are written in the vocabulary, start and stop among them.
        language: whose tag is among them.
    """
    found: list[Letter] = []
    code: int | None = None  # where that of a Chinese character begins
    for number, token in enumerate(tokens):
        if token.startswith(_CODE):
            code = number if code is None else code
            if token == _LAST_OF_CODE:
                found.append(Letter(HAN, code, number + 1))
                code = None
        elif token == _UNKNOWN:
            found.append(Letter(UNKNOWN, number, number + 1))
        elif token not in _SILENT and not (language and token == f"[{language.lower()}]" and number < 2):
            chars = folded(token)
            count = len(chars)
            found += [Letter(one, number + n / count, number + (n + 1) / count) for n, one in enumerate(chars)]
    return found
