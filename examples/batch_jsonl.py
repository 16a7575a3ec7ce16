"""A file of requests, one JSON object a line, to a folder of recordings; failures do not stop the others.

Run: python examples/batch_jsonl.py requests.jsonl folder. The command `chatterbox-turbo batch` does this and goes on
where it was interrupted.
"""

import json
import sys
from pathlib import Path

import soundfile

import chatterbox_turbo as turbo


def speak_lines(model, lines, folder, slots=8):
    """Speaks {"text": ..., ...} of each line; the number of failures. Lines are read as they are needed."""
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    items = ({"seed": number, **json.loads(line)} for number, line in enumerate(lines))
    for number, result in model.turbo.as_completed(items, slots):
        if isinstance(result, Exception):
            failures += 1
            print(f"line {number + 1}: {result}", file=sys.stderr)
        else:
            soundfile.write(folder / f"{number + 1:05}.wav", result.squeeze(0).numpy(), model.sr)
    return failures


if __name__ == "__main__":
    model = turbo.apply(turbo.synthetic.build("english", "tiny"), "fast")
    with open(sys.argv[1], encoding="utf-8") as file:
        sys.exit(bool(speak_lines(model, file, Path(sys.argv[2]))))
