"""Where libraries end sentences, on sentences that are hard: what docs/long_text.md says of them.

    python benchmarks/sentence_boundaries.py [--show] [sentencex] [text] [rules] [pysbd] [syntok] [blingfire]

``sentencex``, ``pysbd``, ``syntok`` and ``blingfire`` are the libraries as they are; ``text`` is what
``chatterbox_turbo.text`` makes of sentencex, ``rules`` what it does without it. What is not installed is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

HARD = [  # language, sentences in a row
    ("en", ["Dr. Smith met Mrs. Jones at 5 p.m. on Main St. yesterday.", "They left."]),
    ("en", ["It costs $3.50, i.e. about 3.14 euros.", "Is that much?", "No!"]),
    ("en", ["See https://example.com/a.b?c=d.e for more.", "Write to j.r.doe@mail.example.org today."]),
    ("en", ["He waited... and waited... but nobody came.", "Then it rained."]),
    ("en", ["“Are you mad?” he asked.", "“No,” she said.", "“I am J. R. R. Tolkien.”"]),
    ("en", ["The U.S. Army came.", "It left the U.S. in May."]),
    ("en", ["Version 2.0.1 came out on Jan. 5, 2024.", "See Fig. 3, p. 12, and vol. 2."]),
    ("en", ["Apple Inc. was founded in 1976.", "Yahoo! was not."]),
    ("en", ["Wait!!", "What?!", "(He was gone.)", "She cried [laugh] and left."]),
    ("en", ["What a day…", "Nobody had seen it coming."]),
    ("de", ["Am 3. Mai kam z. B. Dr. Müller um 12.30 Uhr.", "Er blieb bis zum 5. Juni."]),
    ("de", ["„Kommst du?“, fragte sie.", "„Ja.“", "Das kostet ca. 1.234,56 Euro, d. h. viel."]),
    ("fr", ["M. Dupont habite av. Foch.", "«\u00a0Où va-t-il\u00a0?\u00a0» demanda-t-elle.", "Il part à 8 h."]),
    ("es", ["¿Cómo está Ud., Sr. García?", "¡Muy bien!", "Son las 3 p. m."]),
    ("it", ["Il sig. Rossi abita al n. 5.", "Arriva alle 10.30."]),
    ("ru", ["Это было в 1990 г. в Москве.", "А. С. Пушкин родился в 1799 г.", "И т. д."]),
    ("el", ["Πού πας;", "Πάω σπίτι.", "Ο κ. Παπαδόπουλος ήρθε."]),
    ("pl", ["Np. dr Kowalski mieszka przy ul. Długiej.", "To jest 3. maja."]),
    ("zh", ["他说：“你好！”", "然后走了。", "价格是3.14元。", "真的吗？"]),
    ("ja", ["「本当ですか？」と彼は言った。", "はい、そうです。", "価格は3.14円です！"]),
    ("ko", ["안녕하세요.", "저는 김 씨입니다.", "가격은 3.14달러예요?"]),
    ("ar", ["هل أنت بخير؟", "نعم، أنا بخير.", "السعر 3.14 دولار."]),
    ("hi", ["आप कैसे हैं?", "मैं ठीक हूँ।", "कीमत 3.14 रुपये है।"]),
    ("ur", ["آپ کیسے ہیں؟", "میں ٹھیک ہوں۔"]),
    ("th", ["สวัสดีครับ คุณสบายดีไหม"]),
    ("my", ["မင်္ဂလာပါ။", "နေကောင်းလား။"]),
    ("am", ["ሰላም።", "እንዴት ነህ፧"]),
    ("hy", ["Բարեւ ձեզ։", "Ինչպե՞ս եք։"]),
    ("sw", ["Habari yako?", "Nzuri sana.", "Bei ni 3.14."]),
]

Split = Callable[[str, str], list[str]]


def ours(boundaries: str) -> Split:
    from chatterbox_turbo.text.sentences import segmenter, sentence_spans

    segment = segmenter(boundaries)
    return lambda language, text: [text[start:end] for start, end in sentence_spans(text, language, segment)]


def sentencex() -> Split:
    import sentencex as library

    return lambda language, text: list(library.segment(language, text))


def pysbd() -> Split:
    import pysbd as library
    from pysbd.languages import LANGUAGE_CODES

    def split(language: str, text: str) -> list[str]:
        return library.Segmenter(language=language if language in LANGUAGE_CODES else "en", clean=False).segment(text)

    return split


def syntok() -> Split:
    import syntok.segmenter as library

    def split(language: str, text: str) -> list[str]:
        found = (sentence for paragraph in library.process(text) for sentence in paragraph)
        return ["".join(token.spacing + token.value for token in sentence) for sentence in found]

    return split


def blingfire() -> Split:
    import blingfire as library

    return lambda language, text: library.text_to_sentences(text).split("\n")


LIBRARIES = {
    "sentencex": sentencex,
    "text": lambda: ours("sentencex"),
    "rules": lambda: ours("rules"),
    "pysbd": pysbd,
    "syntok": syntok,
    "blingfire": blingfire,
}


def boundaries(sentences: list[str]) -> set[int]:
    """Characters that are not white space before each inner boundary."""
    found, count = set(), 0
    for sentence in sentences:
        count += len("".join(sentence.split()))
        found.add(count)
    return found - {count}


def main(names: list[str], show: bool) -> None:
    print(f"{'':12}{'right':>8}{'extra':>8}{'missing':>8}{'rows right':>14}")
    for name in names or LIBRARIES:
        try:
            split = LIBRARIES[name]()
        except ImportError:
            print(f"{name:12}not installed")
            continue
        right = extra = missing = rows = 0
        for language, sentences in HARD:
            parts = split(language, ("" if language in ("zh", "ja") else " ").join(sentences))
            want, got = boundaries(sentences), boundaries(parts)
            right, extra, missing = right + len(want & got), extra + len(got - want), missing + len(want - got)
            rows += want == got
            if show and want != got:
                print("   ", language, parts)
        print(f"{name:12}{right:8}{extra:8}{missing:8}{rows:8} of {len(HARD)}")


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--show"], "--show" in sys.argv)
