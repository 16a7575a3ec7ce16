"""A text file read aloud into one audio file, with a voice, chapters and subtitles; interrupted, run it again.

Run: python examples/audiobook.py book.txt book.flac [voice.wav] [--synthetic]. The command `chatterbox-turbo read` does
this and more.
"""

import sys
from pathlib import Path

import torch

import chatterbox_turbo as turbo


def load(synthetic):
    """Upstream's model, or one with random weights, which speaks noise."""
    if synthetic:
        return turbo.synthetic.build("english", "tiny", stop_after=40)
    return turbo.load("english", "cuda" if torch.cuda.is_available() else "cpu", optimize=False)


def show(now):
    """Draws over the line before it."""
    share, minutes = now.tokens / now.all_tokens, now.seconds / 60
    print(f"\r{share:4.0%}, {now.pieces} of {now.all_pieces} pieces, {minutes:.1f} minutes", end="", flush=True)


def read_aloud(model, book, output, recording=None):
    """The report of a reading. What is finished lies in a folder beside the output until all of it is."""
    spoken_with = {}
    if recording is not None:
        model.turbo.voices.add("narrator", recording)  # encoded once, not for each piece
        spoken_with["voice"] = "narrator"
    return model.turbo.read(book, output, seed=1, subtitles="srt", progress=show, **spoken_with)


def main(book, output, *recording):
    model = turbo.apply(load("--synthetic" in sys.argv), "fast")
    try:
        report = read_aloud(model, book, output, *recording)
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. Run it again: it goes on with what is in {output}.parts.")
    made = [*report.files, *report.subtitles, *([report.chapters] if report.chapters else [])]
    print(f"\n{', '.join(path.name for path in made)}: {report.seconds:.1f} s of speech")
    print(f"{report.pieces} pieces, {report.resumed} of them from an earlier run")
    for fault in report.faulty:
        print(f"Listen to this one: {fault}")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:] if argument != "--synthetic"))
