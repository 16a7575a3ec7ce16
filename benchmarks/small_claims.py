"""Microseconds of the lines of upstream that are said to be slow, on a CPU (docs/claims.md).

Run: python benchmarks/small_claims.py. Sizes as in a request of 8 s of speech by a full-size English model.
"""

import time
import unicodedata
import warnings
from timeit import repeat

import torch
from transformers.generation.logits_process import TopPLogitsWarper

from chatterbox_turbo import synthetic

TEXTS = {
    "en": "The quick brown fox jumps over the lazy dog, and nobody in the village knows why it does so again. ",
    "ko": "빠른 갈색 여우가 게으른 개를 뛰어넘는다. 마을 사람들은 그 이유를 모른다. ",
    "ja": "素早い茶色の狐がのろまな犬を飛び越える。村の人は誰もその理由を知らない。",
    "zh": "敏捷的棕色狐狸跳过了懒狗。村里没有人知道它为什么又这样做。",
}


def show(name, statement, number=1000):
    """Print the best of five means over ``number`` runs."""
    print(f"{name:<62}{1e6 * min(repeat(statement, number=number, repeat=5)) / number:>10.1f} us", flush=True)


@torch.inference_mode()
def main():
    """Print a line for each claim."""
    warnings.simplefilter("ignore")
    model = synthetic.build("multilingual", "tiny")
    t3, tokenizer = model.t3, model.tokenizer

    embeddings = torch.randn(13, 256)
    show("voice encoder: .cpu() of its embeddings, already there", embeddings.cpu)
    ids = torch.randint(500, (100,))
    show("tokenizer.decode: .cpu().numpy() of 100 ids (called by nothing)", lambda: ids.cpu().numpy())

    show("a TopPLogitsWarper, built twice a request", lambda: TopPLogitsWarper(top_p=0.9))
    grown, token = torch.zeros(1, 500, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    show("generated_ids: one concatenation, half way to 1000 tokens", lambda: torch.cat([grown, token], dim=1))
    show(
        "speech and position embedding of a token",
        lambda: t3.speech_emb(token) + t3.speech_pos_emb.get_fixed_embedding(9),
    )
    rows = [torch.randn(2, n, 1024) for n in (34, 100, 1)]
    show(
        "embeds of the prefix: stack of concatenated rows",
        lambda: torch.stack([torch.cat(r) for r in zip(*rows, strict=True)]),
    )
    show("the same as one concatenation", lambda: torch.cat(rows, dim=1))

    fmax, wave, table = 8000, torch.randn(1, 240_000), {"8000_cpu": 1}
    show("mel: key and look-up", lambda: table[f"{fmax!s}_{wave.device!s}"])
    show("mel: minimum and maximum of 10 s", lambda: (wave.min(), wave.max()))

    six = [(2, 80, 900), (2, 1, 900), (2, 80, 900), (2,), (2, 80), (2, 80, 900)]
    show("flow solver: its six buffers, once a solve", lambda: [torch.zeros(shape) for shape in six])
    f0 = torch.rand(1, 1, 192_000)

    def harmonics():
        table = torch.zeros(1, 9, 192_000)
        for i in range(9):
            table[:, i : i + 1] = f0 * (i + 1) / 24_000
        return table

    numbers = torch.arange(1, 10).view(1, -1, 1)
    show("vocoder: table of nine harmonics of 8 s by a loop", harmonics, 20)
    show("the same by broadcasting", lambda: f0 * numbers / 24_000, 20)

    for language, text in TEXTS.items():
        start = time.perf_counter()
        tokenizer.text_to_tokens(text, language_id=language)
        first = 1e6 * (time.perf_counter() - start)
        show(f"tokenizer, {language}, {len(text)} characters (first call {first:.0f})",
             lambda text=text, language=language: tokenizer.text_to_tokens(text, language_id=language), 20)  # fmt: skip
    show("of it, the second NFKD of Japanese", lambda: unicodedata.normalize("NFKD", TEXTS["ja"]))

    def imported():
        import unicodedata  # noqa: F401

    show("of it, the import inside the function", imported)


if __name__ == "__main__":
    main()
